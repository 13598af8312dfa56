"""LMCacheEngine on VCache beside LMCache's own backends: `python -m benchmarks.lmcache_backends [--write]`.

Needs LMCache (`make bench-lmcache` makes an environment that has it). On VCache and Mooncake one process
stores and another one loads, on VCache out of a holder's segment; LMCache's other backends store and load in
one process, LocalCPUBackend without leaving its memory: the limit. 8 chunks of 32 MiB, a new prompt in each
round. All take turns, so that what else the machine does hits them alike; a ratio is the median of the
rounds' ratios.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from typing import Final

from benchmarks.lmcache_contestants import LIMIT, PRIMARY, Contest, Contestant
from benchmarks.processes import Pool
from benchmarks.report import (
    ROOT,
    Figure,
    at_least,
    commit,
    console,
    cpu,
    gbytes_per_s,
    machine,
    markdown,
    number,
    ratio,
    result_path,
    show,
    summary,
)
from integration.lmcache.bench.worker import BYTES, CHUNKS
from vcache.bench.echo import Echo, echo
from vcache.limits import MIB

TITLE: Final = f"LMCacheEngine, {CHUNKS} chunks of {BYTES // CHUNKS // MIB} MiB, host memory"
ROUNDS: Final = 5
EXCHANGES: Final = 50
"""Of a bare echo in a round."""


def run(rounds: int = ROUNDS) -> Iterator[Figure]:
    """The figures. RuntimeError where LMCache is not installed."""
    if find_spec("lmcache") is None:
        raise RuntimeError("LMCache is not installed here: use `make bench-lmcache`")
    with ExitStack() as ending:
        pool = ending.enter_context(Pool())
        pool.start_server()
        pool.start_holder("shm:1", 4 * BYTES)
        contest = Contest(pool, ending)
        contestants = list(contest.contestants())
        echoing = ending.enter_context(echo(pool.folder))
        for contestant in contestants:
            contestant.warm_up()
        bare = []
        for prompt in range(1, rounds + 1):
            bare.append(_exchange(echoing))
            for contestant in contestants:
                contestant.round(prompt)
    yield Figure("LMCache", version("lmcache"))
    yield from _figures(contestants, bare)
    for name, why in contest.left_out.items():
        yield Figure(name, f"left out: {why}")


def _exchange(echoing: Echo) -> float:
    """Seconds of an exchange of a frame as large as the request of a lookup."""
    frame, taken = bytes(CHUNKS * 32 + 64), []
    for _ in range(EXCHANGES):
        begin = time.perf_counter()
        echoing.exchange(frame)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def _figures(contestants: Sequence[Contestant], bare: Sequence[float]) -> Iterator[Figure]:
    for each in contestants:
        yield Figure(f"{each.name}: store", gbytes_per_s(BYTES, each.stores))
        yield Figure(f"{each.name}: retrieve", gbytes_per_s(BYTES, each.retrieves))
        yield Figure(f"{each.name}: lookup", f"{statistics.median(each.lookups) * 1e6:,.0f} µs")
    named = {each.name: each for each in contestants}
    ours, limit = named[PRIMARY], named[LIMIT]
    yield Figure("bare ZeroMQ echo", f"{statistics.median(bare) * 1e6:,.0f} µs")
    yield Figure(f"{PRIMARY}: lookup beside the echo", f"{number(ratio(ours.lookups, bare))} ×")
    yield Figure(f"{LIMIT}: lookup beside the echo", f"{number(ratio(limit.lookups, bare))} ×")
    yield at_least(f"store: {PRIMARY} beside {LIMIT}", ratio(limit.stores, ours.stores), 0.8, "×")
    yield at_least(f"retrieve: {PRIMARY} beside {LIMIT}", ratio(limit.retrieves, ours.retrieves), 0.8, "×")
    for other in contestants:
        if other is not limit and not other.name.startswith("VCache"):
            yield at_least(f"store: {PRIMARY} beside {other.name}", ratio(other.stores, ours.stores), 1, "×")
            share = ratio(other.retrieves, ours.retrieves)
            yield at_least(f"retrieve: {PRIMARY} beside {other.name}", share, 1, "×")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 2 where LMCache is not installed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lmcache_backends", description=__doc__)
    parser.add_argument("--write", action="store_true", help="also to benchmarks/results/")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    asked = parser.parse_args(argv)
    try:
        figures = list(run(asked.rounds))
    except RuntimeError as error:
        print(f"python -m benchmarks.lmcache_backends: {error}", file=sys.stderr)
        return 2
    show(TITLE, figures, console())
    print(summary(figures))
    print(machine())
    if asked.write:
        path = result_path(cpu(), f"{commit()}-lmcache")
        path.parent.mkdir(exist_ok=True)
        path.write_text(markdown({TITLE: figures}), encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that was started ends, too
    raise SystemExit(main())
