"""A live view of the pool: segments, fill, hit rate, requests per second. Ctrl-C ends it."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from vcache.cli import pool_tables, present
from vcache.cli.connect import connected
from vcache.cli.exits import Exit
from vcache.cli.invocation import Invocation
from vcache.client import Client
from vcache.errors import ArgumentError, Unavailable
from vcache.protocol import Statistics
from vcache.runtime import runtime_path

if TYPE_CHECKING:
    from rich.console import RenderableType

_INTERVAL_MIN_S = 0.05


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vcache top`."""
    parser.add_argument(
        "--interval-s", type=float, default=1.0, metavar="S", help="between looks (default 1)"
    )
    parser.add_argument("--once", action="store_true", help="one look (two, for the rates) and no live view")


@dataclass(frozen=True)
class Look:
    """What the server said, and when (seconds of a monotonic clock)."""

    at_s: float
    statistics: Statistics


@dataclass(frozen=True)
class Rates:
    """What happened between two looks, per second; hit_rate: of the chunks wanted since, None if there were
    none.
    """

    requests: float
    looked_up: float
    committed: float
    evicted: float
    committed_bytes: float
    hit_rate: float | None


def rates(before: Look, after: Look) -> Rates | None:
    """Differences of counters; None where there are none to take: a server that was restarted counts anew."""
    old, new = before.statistics.counters, after.statistics.counters
    seconds = after.at_s - before.at_s
    if (
        seconds <= 0
        or new.get("uptime_s", 0.0) < old.get("uptime_s", 0.0)
        or new.get("pid") != old.get("pid")
    ):
        return None

    def difference(name: str) -> float:
        return new.get(name, 0.0) - old.get(name, 0.0)

    wanted = difference("wanted_chunks")
    return Rates(
        requests=difference("requests") / seconds,
        looked_up=difference("looked_up") / seconds,
        committed=difference("committed") / seconds,
        evicted=difference("evicted") / seconds,
        committed_bytes=difference("committed_bytes") / seconds,
        hit_rate=difference("hit_chunks") / wanted if wanted > 0 else None,
    )


def run(invocation: Invocation) -> int:
    """Look again and again until interrupted; a server that goes away meanwhile is waited for."""
    interval_s: float = invocation.options.interval_s
    if not _INTERVAL_MIN_S <= interval_s <= 3600:
        raise ArgumentError("--interval-s", interval_s, f"{_INTERVAL_MIN_S} to 3600 (seconds)")
    where = str(runtime_path(invocation.config.runtime_dir))
    with connected(invocation.observing(), "vcache top") as client:
        if invocation.options.once:
            first = _look(client)
            time.sleep(interval_s)
            second = _look(client)
            _show_once(second, rates(first, second), where, as_json=invocation.as_json)
        elif invocation.as_json:
            _stream(client, interval_s)
        else:
            _live(client, interval_s, where)
    return Exit.OK


def _look(client: Client) -> Look:
    return Look(time.monotonic(), client.stats())


def _as_json(look: Look, rate: Rates | None) -> dict[str, object]:
    members = None if rate is None else dict(vars(rate))
    return {"counters": look.statistics.counters, "segments": look.statistics.segments, "per_second": members}


def _show_once(look: Look, rate: Rates | None, where: str, *, as_json: bool) -> None:
    if as_json:
        present.write_json(_as_json(look, rate))
    else:
        present.console().print(_frame(look.statistics, rate, where))


def _stream(client: Client, interval_s: float) -> None:
    """One JSON value a look, until interrupted or the server is gone."""
    before = _look(client)
    while True:
        time.sleep(interval_s)
        after = _look(client)
        present.write_json(_as_json(after, rates(before, after)))
        before = after


def _live(client: Client, interval_s: float, where: str) -> None:
    from rich.live import Live

    before = _look(client)
    console = present.console()
    first = _frame(before.statistics, None, where)
    with (
        interruptible() as interrupted_within,
        Live(first, console=console, screen=console.is_terminal, auto_refresh=False) as live,
    ):
        while not interrupted_within(interval_s):
            try:
                after = _look(client)
            except Unavailable as error:
                live.update(present.lines(f"waiting for the metadata server: {error}"), refresh=True)
                continue
            live.update(_frame(after.statistics, rates(before, after), where), refresh=True)
            before = after


@contextmanager
def interruptible() -> Iterator[Callable[[float], bool]]:
    """A wait of so many seconds that says whether somebody pressed Ctrl-C, before it or meanwhile.

    As an exception it may come up in a destructor or a callback, where Python drops exceptions, and is lost.
    """
    pressed: SimpleQueue[None] = SimpleQueue()  # its put may interrupt its get, which an Event's set may not

    def within(seconds: float) -> bool:
        try:
            pressed.get(timeout=seconds)
        except Empty:
            return False
        return True

    before = signal.signal(signal.SIGINT, lambda *_: pressed.put(None))
    try:
        yield within
    finally:
        signal.signal(signal.SIGINT, before)


def _frame(statistics: Statistics, rate: Rates | None, where: str) -> RenderableType:
    from rich.console import Group

    return Group(
        pool_tables.summary(statistics, where),
        present.lines(_per_second(rate)),
        present.text(""),
        pool_tables.segments(statistics),
        pool_tables.sessions(statistics, leave_out_pid=os.getpid()),
    )


def _per_second(rate: Rates | None) -> str:
    if rate is None:
        return "per second: –"
    hits = "–" if rate.hit_rate is None else present.share(rate.hit_rate, 1.0)
    return (
        f"per second: {rate.requests:,.0f} requests · {rate.looked_up:,.0f} keys looked up · "
        f"{rate.committed:,.0f} chunks stored ({present.size(rate.committed_bytes)}) · "
        f"{rate.evicted:,.0f} evicted · hit rate now {hits}"
    )
