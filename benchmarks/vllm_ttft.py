"""`python -m benchmarks.vllm_ttft`: time to the first token with VCache, beside vLLM's own prefix cache and
peers.

All servers are started the same way and bound to the same cores, the baseline among them; models have random
weights; every prompt is new to a warm server. One run measures everything, with all servers stopped but one.
A hit of a cache is compared with one of the same server's own prefix cache, right after: two servers that do
the same differ by more milliseconds than a copy takes, and so does one server within two seconds. The copies
that hits are measured by are made between them. What storing costs is measured as in `vllm_storing.py`. To be
run in the environment that `make test-vllm` makes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.report import MEDIAN_RANGE_SAYS, keep, machine
from benchmarks.vllm_chats import chats
from benchmarks.vllm_peers import PEERS
from benchmarks.vllm_servers import SEGMENT, Folder, folder, forget
from benchmarks.vllm_storing import COLD, STORING, TWIN, Cold, add_rows
from benchmarks.vllm_storing import measure as measure_storing
from benchmarks.vllm_workload import (
    LENGTHS,
    MODELS,
    Prompts,
    at_least_one,
    cached_tokens,
    in_turns,
    made_models,
    random_prompts,
    stir,
    token_bytes,
    warm,
)
from demo.processes import DemoFailed
from demo.random_model import fast_dtype
from demo.vllm_client import complete

FLOOR_ROUNDS = 3
AWAKE_TRIES = 5
BEYOND_CACHES = 256 << 20
"""Bytes; more than any processor's caches hold of what was there before."""

FLOOR, OURS = "own prefix cache", "VCache"


@dataclass
class Figures:
    """Seconds to the first token of each measurement, by what was measured and prompt length.

    over: of what came from a cache, how much longer than the server's own prefix cache took right after it.
    cold: what VCache stored, and the same without it. memcpy_s: of the bytes that a hit loads. left_out:
    peers, and why.
    """

    ttft_s: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    over_s: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    cold: Cold = field(default_factory=Cold)
    memcpy_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    left_out: dict[str, str] = field(default_factory=dict)

    def leave_out(self, name: str, why: str) -> None:
        """A peer ended before everything was measured: a part of it is no comparison."""
        for figures in (self.ttft_s, self.over_s):
            for key in [key for key in figures if name in key[0]]:
                del figures[key]
        self.left_out[name] = why


def main() -> int:
    """Measure, print; 0 if the wanted bounds are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--prompts", type=at_least_one, default=2, help="of each length, to be hit (2)")
    parser.add_argument("--rounds", type=at_least_one, default=60, help="hits of each prompt in VCache (60)")
    parser.add_argument(
        "--peer-rounds", type=at_least_one, default=12, help="hits of each prompt elsewhere (12)"
    )
    parser.add_argument(
        "--storing", type=at_least_one, default=12, help="prompts of each length that are only stored (12)"
    )
    parser.add_argument("--cores", default="0-1", help="as VLLM_CPU_OMP_THREADS_BIND says them (0-1)")
    parser.add_argument("--without", nargs="*", default=[], help="of: example lmcache mooncake chat")
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/")
    options = parser.parse_args()
    console = Console(width=130, record=True)
    console.print(machine())
    good = True
    for label, base, model in made_models(options.models):
        good &= _measure_model(console, base, label, model, options)
    if options.write:
        keep(console, "Time to the first token", "vllm")
    return 0 if good else 1


def _measure_model(
    console: Console, base: Path, label: str, model: Path, options: argparse.Namespace
) -> bool:
    figures = Figures()
    prompts = {length: random_prompts(1, length, options.prompts) for length in LENGTHS}
    with folder(base / f"{label}-ttft") as where:
        console.print(f"{label}: vLLM and VCache")
        floor = where.start_vllm(model, options.cores)
        warm(floor)
        with where.within("vcache") as inner:
            _vcache(inner, floor, model, token_bytes(label), prompts, figures, options)
        for name, start in PEERS.items():
            if name.lower().startswith(tuple(options.without or ["-"])):
                continue
            console.print(f"{label}: {name}")
            with where.within(name) as inner:
                try:
                    _peer(inner, start(inner, model, options.cores), floor, name, prompts, figures, options)
                except (DemoFailed, OSError, RuntimeError, HTTPException) as error:
                    figures.leave_out(name, f"{str(error)[-300:]}\n{inner.last_words()}")
    good = _report(console, label, figures, token_bytes(label))
    if "chat" not in options.without:
        console.print(chats(base / f"{label}-chat", model))
    return good


# -- what is measured


def _vcache(
    where: Folder,
    floor: int,
    model: Path,
    kv_bytes: int,
    prompts: Prompts,
    figures: Figures,
    options: argparse.Namespace,
) -> None:
    """One engine computes and stores in its segment, another one hits there."""
    pool = where.start_pool()
    writer = where.start_vllm(model, options.cores, where.vcache(SEGMENT))
    where.only(writer)
    warm(writer, 98)
    where.stop_all()
    twin = where.start_vllm(model, options.cores)
    where.only(twin)
    warm(twin)
    ports = {COLD: floor, TWIN: twin, STORING: writer}
    measure_storing(
        where, pool, ports, {each: random_prompts(2, each, options.storing) for each in LENGTHS}, figures.cold
    )
    measure_storing(where, pool, ports, prompts, figures.cold)
    where.stop_vllm(twin)
    reader = where.start_vllm(model, options.cores, where.vcache())
    where.only(reader)
    warm(reader, 99)
    rounds = options.rounds
    while rounds:
        some = min(rounds, options.peer_rounds)
        _hits(where, floor, reader, OURS, prompts, figures, some)
        rounds -= some
        where.stop_all()
        for length in LENGTHS:
            figures.memcpy_s[length].append(_memcpy_s(cached_tokens(length) * kv_bytes))


def _peer(
    where: Folder,
    port: int,
    floor: int,
    name: str,
    prompts: Prompts,
    figures: Figures,
    options: argparse.Namespace,
) -> None:
    """One engine stores, forgets what it has itself, and hits."""
    where.only(port)
    warm(port)
    for length, _, prompt in in_turns(prompts):
        figures.ttft_s[f"cold, {name}", length].append(complete(port, prompt, max_tokens=1).ttft_s)
        time.sleep(0.5)  # its stores have no end that one could wait for
    forget(port)
    _hits(where, floor, port, name, prompts, figures, options.peer_rounds)


def _hits(
    where: Folder, floor: int, port: int, name: str, prompts: Prompts, figures: Figures, rounds: int
) -> None:
    """All prompts at the baseline, which has them itself. Then in each round: each prompt at a server that
    gets it from its cache; and there once more, for now it has it itself. Before each a few tokens are
    computed, with all of the model's weights: what was in the processor's caches is not there any more.
    """
    whole, own = name == OURS, f"{name}, own prefix cache"
    where.only(floor)
    for number in range(FLOOR_ROUNDS + 1):
        for length, _, prompt in in_turns(prompts):
            seconds = _second(floor, prompt, number, whole=True)
            if number:  # it warms up
                figures.ttft_s[FLOOR, length].append(seconds)
    where.only(port)
    _awaken(port, prompts[LENGTHS[0]][0], whole=whole)
    for number in range(rounds + 1):
        forget(port)
        for length, _, prompt in in_turns(prompts):
            hit = _second(port, prompt, number, whole=whole)
            again = _second(port, prompt, number, whole=True)
            if number:
                figures.ttft_s[name, length].append(hit)
                figures.ttft_s[own, length].append(again)
                figures.over_s[name, length].append(hit - again)


def _awaken(port: int, prompt: list[int], *, whole: bool) -> None:
    """Have a server that was stopped hit again, whose connections may have to begin anew."""
    for _ in range(AWAKE_TRIES):
        forget(port)
        with suppress(RuntimeError):
            _hit(port, prompt, whole=whole)
            break


def _second(port: int, prompt: list[int], number: int, *, whole: bool) -> float:
    """A hit, after a few tokens."""
    stir(port, number)
    return _hit(port, prompt, whole=whole)


def _hit(port: int, prompt: list[int], *, whole: bool = True) -> float:
    """Ask what must be cached. Raises RuntimeError if it was not."""
    answer = complete(port, prompt, max_tokens=1)
    wanted = cached_tokens(len(prompt)) if whole else len(prompt) // 2
    if answer.cached_tokens < wanted:
        raise RuntimeError(f"{answer.cached_tokens} of {len(prompt)} tokens were cached, wanted {wanted}")
    return answer.ttft_s


# -- the report


def _memcpy_s(size: int) -> float:
    """The median of some copies of so many bytes, as one thread makes them. None of these is in a cache of
    the processor, for nothing is of what is loaded, either.
    """
    source, target, other = (np.ones(each, np.uint8) for each in (size, size, BEYOND_CACHES))
    seconds = []
    for _ in range(7):
        np.add(other, 1, out=other)
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _report(console: Console, label: str, figures: Figures, kv_bytes: int) -> bool:
    title = f"{label}, {fast_dtype()}, {kv_bytes >> 10} KiB a token: medians"
    table = Table("TTFT in ms", *map(str, LENGTHS), title=title)
    found = {**figures.cold.ttft_s, **figures.ttft_s}
    for name in dict.fromkeys(name for name, _ in found):
        cells = [found.get((name, length)) for length in LENGTHS]
        table.add_row(name, *(f"{statistics.median(cell) * 1e3:.1f}" if cell else "-" for cell in cells))
    table.add_section()
    over: dict[str, list[float]] = {}
    for name in dict.fromkeys(name for name, _ in figures.over_s):
        over[name] = [statistics.median(figures.over_s[name, length]) * 1e3 for length in LENGTHS]
        table.add_row(f"{name}, over the floor", *(f"{each:.1f}" for each in over[name]))
    bounds = [1.5e3 * statistics.median(figures.memcpy_s[length]) + 3 for length in LENGTHS]
    table.add_row("wanted: 1.5 × memcpy + 3 ms", *(f"≤ {bound:.1f}" for bound in bounds))
    cheap = add_rows(table, figures.cold, LENGTHS)
    console.print(table)
    console.print(f"{MEDIAN_RANGE_SAYS}; slices: of servers that compute at once, in turns")
    for name, why in figures.left_out.items():
        console.print(f"left out: {name}: {why}", markup=False)
    met = all(a <= b for a, b in zip(over[OURS], bounds, strict=True))
    peers = [values for name, values in over.items() if name != OURS]
    faster = all(a < b for values in peers for a, b in zip(over[OURS], values, strict=True))
    beside = f"faster than each of {len(peers)} peers: {faster}" if peers else "no peer was measured"
    console.print(f"over the floor: {'met' if met else 'missed'}; {beside}")
    return met and faster and cheap


if __name__ == "__main__":
    sys.exit(main())
