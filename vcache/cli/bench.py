"""Measure copies and requests on this machine; medians and ratios of one run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from vcache.cli import present
from vcache.cli.connect import server_pid
from vcache.cli.exits import Exit
from vcache.cli.invocation import Invocation, common_options
from vcache.config import Config, load
from vcache.errors import ArgumentError, SegmentError
from vcache.limits import MIB
from vcache.room import memory_room

if TYPE_CHECKING:
    from vcache.bench.copy import CopyRow
    from vcache.bench.lookup import LookupRow

_DEFAULTS: Final[dict[str, dict[str, object]]] = {
    "copy": {"rounds": 9, "chunks": 8, "threads": 0, "page_tokens": 16, "axes": "kpshd"},
    "lookup": {"rounds": 1_000, "private": False},
}
"""The kinds of measurement, and the options of each where they are not given."""

_COPIES_OF_MEMORY: Final = 4


def arguments(parser: argparse.ArgumentParser) -> None:
    """What can be measured, and the options of each."""
    kinds = parser.add_subparsers(
        dest="kind", metavar="KIND", help="default: all of them, one after the other"
    )
    copy = kinds.add_parser(
        "copy",
        parents=[common_options()],
        help="gather and scatter beside one memcpy; on GPUs also every pair of them",
    )
    copy.add_argument("--device", help="shm:N or cuda:N (default: `device` of the configuration)")
    copy.add_argument("--chunks", type=int, metavar="N", help="chunks of 32 MiB (default 8)")
    copy.add_argument("--threads", type=int, metavar="N", help="default: as many as torch has")
    copy.add_argument("--page-tokens", type=int, metavar="N", help="default 16")
    copy.add_argument("--axes", help="of the paged tensors (default kpshd)")
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
        each.add_argument("--rounds", type=int, metavar="N", help=f"default {_DEFAULTS[kind]['rounds']}")


def run(invocation: Invocation) -> int:
    """Measure and print a table, or JSON with the machine that it was measured on."""
    kinds = [invocation.options.kind] if invocation.options.kind else list(_DEFAULTS)
    asked = {kind: _options(invocation, kind) for kind in kinds}
    measured = {kind: _MEASURES[kind](invocation, options) for kind, options in asked.items()}
    if invocation.as_json:
        from vcache.bench.lookup import machine

        found = measured if len(measured) > 1 else measured[kinds[0]]
        present.write_json({"machine": machine(), **found})
    return Exit.OK


def _options(invocation: Invocation, kind: str) -> argparse.Namespace:
    """The options of one kind, with its defaults. Raises ArgumentError."""
    given = {name: value for name, value in vars(invocation.options).items() if value is not None}
    options = argparse.Namespace(**{**_DEFAULTS[kind], "device": invocation.config.device, **given})
    for name in ("rounds", "chunks", "page_tokens"):
        if getattr(options, name, 1) < 1:
            raise ArgumentError(f"--{name.replace('_', '-')}", getattr(options, name), "1 or more")
    return options


def _copy(invocation: Invocation, options: argparse.Namespace) -> dict[str, object]:
    from vcache.bench import copy
    from vcache.segment import parse_device

    kind, _ = parse_device(options.device)
    needed = _COPIES_OF_MEMORY * options.chunks * copy.LLAMA3_8B.chunk_bytes
    _check_room(options.device, needed, options.chunks)
    with _status(f"copying {present.size(needed // _COPIES_OF_MEMORY)} back and forth …"):
        rows = copy.measure(
            chunks=options.chunks,
            threads=options.threads,
            axes=options.axes,
            page_tokens=options.page_tokens,
            rounds=options.rounds,
            device=options.device if kind == "cuda" else "cpu",
        )
    pairs = _pairs() if kind == "cuda" else []
    if not invocation.as_json:
        _print_copies(options.device, rows, pairs)
    return {"device": options.device, "rows": rows, "pairs": pairs}


def _check_room(device: str, needed: int, chunks: int) -> None:
    """Raise SegmentError, with what there is, unless the device has so much memory to spend."""
    if not device.startswith("cuda"):
        room = memory_room()
        available, words = room.spendable, str(room)
    else:
        from vcache.segment.gpu import gpu_uuid

        gpu_uuid(int(device.rpartition(":")[2]))  # raises SegmentError, in words, if it is not there
        import torch

        if not torch.cuda.is_available():
            raise SegmentError(f"torch {torch.__version__} sees no GPU: install a build that fits the driver")
        available, total = torch.cuda.mem_get_info(device)
        words = f"{available // MIB} MiB free of {total // MIB} MiB on {device}"
    if needed > available:
        raise SegmentError(
            f"measuring {chunks} chunks takes {needed // MIB} MiB: there are {words}; --chunks less"
        )


def _pairs() -> list[dict[str, object]]:
    """Every pair of GPUs: exported here, opened by a second process, read and written by it."""
    from vcache.cli.check_segments import measured_pairs
    from vcache.segment.gpu import device_count

    with _status("opening GPU memory in a second process …"):
        return [dict(vars(pair)) for pair in measured_pairs(device_count())]


def _print_copies(device: str, rows: list[CopyRow], pairs: list[dict[str, object]]) -> None:
    where = "shared memory" if device.startswith("shm") else f"the memory of {device}"
    table = present.table(f"copies in {where}", "what", "order", ">threads", ">ms", ">GB/s", ">× memcpy")
    for row in rows:
        shown = f"{row.seconds * 1e3:.3g}", f"{row.gbytes_per_s:,.2f}", f"{row.ratio:.2f}"
        present.add_row(table, [row.name, row.order, row.threads or "–", *shown])
    console = present.console()
    console.print(table)
    if pairs:
        from vcache.cli.check_segments import pair_table

        console.print(pair_table(pairs))
        for pair in pairs:
            if pair["error"]:
                console.print(present.text(f"{pair['holder']} from {pair['reader']}: {pair['error']}"))


def _lookup(invocation: Invocation, options: argparse.Namespace) -> dict[str, object]:
    from vcache.bench.echo import echo
    from vcache.bench.lookup import WARM_UP, bench_client, measure
    from vcache.bench.private_server import private_directory

    is_private = options.private or server_pid(invocation.config) is None
    with ExitStack() as stack:
        folder = stack.enter_context(private_directory())
        config = stack.enter_context(_private(folder)) if is_private else invocation.observing()
        client = stack.enter_context(bench_client(config))
        there = stack.enter_context(echo(folder))
        advance = stack.enter_context(_progress("requests", options.rounds + WARM_UP))
        rows = measure(client, there, options.rounds, on_round=advance)
    if not invocation.as_json:
        _print_requests(rows, is_private=is_private)
    return {"private": is_private, "rows": rows}


def _print_requests(rows: list[LookupRow], *, is_private: bool) -> None:
    which = "a private server" if is_private else "the server that runs here"
    table = present.table(
        f"requests to {which}", "request", ">keys", ">median µs", ">p99 µs", ">keys/s", ">× echo"
    )
    for row in rows:
        times = f"{row.median_us:.1f}", f"{row.p99_us:.1f}"
        keys = f"{row.keys_per_s:,.0f}" if row.keys else "–"
        present.add_row(table, [row.name, row.keys or "–", *times, keys, f"{row.ratio:.2f}"])
    present.console().print(table)


_MEASURES: Final[dict[str, Callable[[Invocation, argparse.Namespace], dict[str, object]]]] = {
    "copy": _copy,
    "lookup": _lookup,
}


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
