"""The chunks in the pool, a page at a time: key, model, layout, place, age, rights."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from vcache.cli import present
from vcache.cli.connect import connected
from vcache.cli.exits import Exit
from vcache.cli.invocation import Invocation
from vcache.cli.models import name_of, namespaces_of
from vcache.client import Client
from vcache.errors import ArgumentError
from vcache.limits import LIST_PAGE_MAX
from vcache.protocol import ChunkRow

_KEY_DIGITS = 16


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vcache list`."""
    parser.add_argument(
        "--limit", type=int, default=50, metavar="N", help="rows at most; 0: all (default 50)"
    )
    parser.add_argument(
        "--cursor", type=int, default=0, metavar="N", help="go on where an earlier call ended"
    )
    parser.add_argument("--model", metavar="NAME", help="only the chunks of this model")


def run(invocation: Invocation) -> int:
    """Read pages until there are enough rows, and print them."""
    options = invocation.options
    for name in ("limit", "cursor"):
        if getattr(options, name) < 0:
            raise ArgumentError(f"--{name}", getattr(options, name), "0 or more")
    with connected(invocation.observing(), "vcache list") as client:
        statistics = client.stats()
        spaces = None if options.model is None else namespaces_of(options.model, statistics.labels)
        with _progress(int(statistics.counters["replicas"]), is_wanted=not invocation.as_json) as advance:
            rows, cursor = _read(client, options.cursor, options.limit, spaces, advance)
    if invocation.as_json:
        present.write_json({"chunks": rows, "cursor": cursor, "labels": statistics.labels})
        return Exit.OK
    _print(rows, cursor, statistics.labels)
    return Exit.OK


class _Advance:
    """Called with the rows that a page had."""

    def __call__(self, rows: int) -> None:
        """Nothing is shown."""


def _read(
    client: Client, cursor: int, limit: int, spaces: list[bytes] | None, advance: _Advance
) -> tuple[list[ChunkRow], int]:
    """Rows from `cursor` on, `limit` at most (0: all), and the cursor to go on from (0: that was all)."""
    rows: list[ChunkRow] = []
    while True:
        page_rows = (
            LIST_PAGE_MAX if spaces is not None or not limit else min(limit - len(rows), LIST_PAGE_MAX)
        )
        page = client.list(cursor, page_rows)
        advance(len(page.rows))
        for number, row in enumerate(page.rows, start=1):
            if spaces is not None and row.namespace not in spaces:
                continue
            rows.append(row)
            if len(rows) == limit:
                # A cursor is known of a page's end only: ask for the page that ends here.
                end = page if number == len(page.rows) else client.list(cursor, number)
                return rows, end.cursor
        cursor = page.cursor
        if not cursor:
            return rows, 0


@contextmanager
def _progress(total: int, *, is_wanted: bool) -> Iterator[_Advance]:
    """A progress bar on standard error, where somebody sees it and it takes a while."""
    console = present.console(errors=True)
    if not is_wanted or not console.is_terminal or total <= LIST_PAGE_MAX:
        yield _Advance()
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading the directory", total=total)

        class Shown(_Advance):
            def __call__(self, rows: int) -> None:
                progress.advance(task, rows)

        yield Shown()


def _print(rows: list[ChunkRow], cursor: int, labels: Mapping[str, str]) -> None:
    table = present.table(
        "", "key", "model", "layout", ">segment", ">offset", ">size", ">idle", ">expires", "held by"
    )
    for row in rows:
        held = [f"{row.pins} pins"] * (row.pins > 0) + [f"{row.leases} leases"] * (row.leases > 0)
        present.add_row(
            table,
            [
                row.key.hex()[:_KEY_DIGITS] + "…",
                name_of(row.namespace, labels),
                name_of(row.layout, labels),
                row.segment,
                row.offset,
                present.size(row.length),
                present.duration(row.idle_s),
                "never" if row.expires_s is None else f"in {present.duration(row.expires_s)}",
                ", ".join(held),
            ],
        )
    console = present.console()
    console.print(table)
    more = f"; more with --cursor {cursor}" if cursor else ""
    console.print(present.text(f"{len(rows):,} chunks{more}"))
