"""Measure copies and requests on this machine; medians and ratios of one run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from vcache.cli import present
from vcache.cli.connect import server_pid
from vcache.cli.exits import Exit
from vcache.cli.invocation import Invocation, common_options
from vcache.config import Config, load
from vcache.errors import ArgumentError, SegmentError
from vcache.limits import MIB
from vcache.room import memory_room

_ROUNDS = {"copy": 9, "lookup": 1_000}
_COPIES_OF_MEMORY = 4


def arguments(parser: argparse.ArgumentParser) -> None:
    """What can be measured, and the options of each."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    copy = kinds.add_parser(
        "copy", parents=[common_options()], help="gather and scatter in shared memory, beside one memcpy"
    )
    copy.add_argument("--chunks", type=int, default=8, metavar="N", help="chunks of 32 MiB (default 8)")
    copy.add_argument("--threads", type=int, default=0, metavar="N", help="default: as many as torch has")
    copy.add_argument("--page-tokens", type=int, default=16, metavar="N", help="default 16")
    copy.add_argument("--axes", default="kpshd", help="of the paged tensors (default kpshd)")
    lookup = kinds.add_parser(
        "lookup",
        parents=[common_options()],
        help="requests to the metadata server, beside a bare ZeroMQ echo",
    )
    lookup.add_argument(
        "--private",
        action="store_true",
        help="a server of its own, even where one runs (default: the one that runs)",
    )
    for kind, each in (("copy", copy), ("lookup", lookup)):
        default = _ROUNDS[kind]
        each.add_argument("--rounds", type=int, default=default, metavar="N", help=f"default {default}")


def run(invocation: Invocation) -> int:
    """Measure and print a table, or JSON with the machine that it was measured on."""
    options = invocation.options
    for name in ("rounds", "chunks", "page_tokens"):
        if getattr(options, name, 1) < 1:
            raise ArgumentError(f"--{name.replace('_', '-')}", getattr(options, name), "1 or more")
    return _copy(invocation) if options.kind == "copy" else _lookup(invocation)


def _copy(invocation: Invocation) -> int:
    from vcache.bench import copy
    from vcache.bench.lookup import machine

    options = invocation.options
    needed = _COPIES_OF_MEMORY * options.chunks * copy.LLAMA3_8B.chunk_bytes
    room = memory_room()
    if needed > room.spendable:
        raise SegmentError(
            f"measuring {options.chunks} chunks takes {needed // MIB} MiB: there are {room}; --chunks less"
        )
    with _status(f"copying {present.size(needed // _COPIES_OF_MEMORY)} back and forth …"):
        rows = copy.measure(
            chunks=options.chunks,
            threads=options.threads,
            axes=options.axes,
            page_tokens=options.page_tokens,
            rounds=options.rounds,
        )
    if invocation.as_json:
        present.write_json({"machine": machine(), "rows": rows})
        return Exit.OK
    table = present.table("copies in shared memory", "what", "order", ">threads", ">ms", ">GB/s", ">× memcpy")
    for row in rows:
        shown = f"{row.seconds * 1e3:.1f}", f"{row.gbytes_per_s:.2f}", f"{row.ratio:.2f}"
        present.add_row(table, [row.name, row.order, row.threads, *shown])
    present.console().print(table)
    return Exit.OK


def _lookup(invocation: Invocation) -> int:
    from vcache.bench.echo import echo
    from vcache.bench.lookup import WARM_UP, bench_client, machine, measure
    from vcache.bench.private_server import private_directory

    rounds = invocation.options.rounds
    is_private = invocation.options.private or server_pid(invocation.config) is None
    with ExitStack() as stack:
        folder = stack.enter_context(private_directory())
        config = stack.enter_context(_private(folder)) if is_private else invocation.observing()
        client = stack.enter_context(bench_client(config))
        there = stack.enter_context(echo(folder))
        advance = stack.enter_context(_progress("requests", rounds + WARM_UP))
        rows = measure(client, there, rounds, on_round=advance)
    if invocation.as_json:
        present.write_json({"machine": machine(), "private": is_private, "rows": rows})
        return Exit.OK
    which = "a private server" if is_private else "the server that runs here"
    table = present.table(
        f"requests to {which}", "request", ">keys", ">median µs", ">p99 µs", ">keys/s", ">× echo"
    )
    for row in rows:
        times = f"{row.median_us:.1f}", f"{row.p99_us:.1f}"
        keys = f"{row.keys_per_s:,.0f}" if row.keys else "–"
        present.add_row(table, [row.name, row.keys or "–", *times, keys, f"{row.ratio:.2f}"])
    present.console().print(table)
    return Exit.OK


@contextmanager
def _private(folder: Path) -> Iterator[Config]:
    """A server of defaults in `folder`, and the configuration of its clients."""
    from vcache.bench.private_server import private_server

    path = folder / "run"
    path.mkdir(mode=0o700)
    config = load(environ={}, runtime_dir=str(path), server={"autostart": False}).config
    patient = msgspec.structs.replace(config.client, request_timeout_ms=10_000, connect_timeout_ms=10_000)
    with private_server(path, config):
        yield msgspec.structs.replace(config, client=patient)


@contextmanager
def _status(words: str) -> Iterator[None]:
    """Something that moves, where somebody sees it."""
    console = present.console(errors=True)
    if not console.is_terminal:
        yield
        return
    with console.status(words):
        yield


@contextmanager
def _progress(words: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, where somebody sees it; drawn seldom, since it costs time."""
    console = present.console(errors=True)
    if not console.is_terminal:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task(words, total=total)
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if done % 50 == 0:
                progress.update(task, completed=done, refresh=True)

        yield advance
