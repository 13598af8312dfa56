"""`python -m benchmarks.vllm_storing`: how long a cold prompt takes vLLM while VCache stores, and without.

A prompt is asked of a server that stores in VCache and of two alike without a connector. They compute it in
slices of a tenth of a second, in turns, and each one's time is that in which it ran, the metadata server with
the one that stores (`vllm_slices.py`). The two without say how far two servers that do the same differ here.

What a step has computed is stored after it: of a prompt that is one step, when its token is out. So this is
run with steps of 512 tokens, too (`--step-tokens`), where all but a prompt's end is stored while the rest is
computed. To be run in the environment that `make test-vllm` makes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.report import MEDIAN_RANGE_SAYS, keep, machine, median_range
from benchmarks.vllm_servers import (
    BLOCK_TOKENS,
    PROMPT_TOKENS_MAX,
    SEGMENT,
    STEP_TOKENS,
    Folder,
    folder,
    forget,
)
from benchmarks.vllm_slices import ttft_in_slices
from benchmarks.vllm_workload import (
    LENGTHS,
    MODELS,
    Prompts,
    at_least_one,
    in_turns,
    made_models,
    random_prompts,
    stir,
    warm,
)
from demo.processes import Child
from demo.random_model import fast_dtype
from demo.vllm_client import metric

RATIO_MAX = 1.03
STORED = "vllm:vcache_stored_chunks_total"

COLD, TWIN, STORING = "cold (slices)", "cold, another server (slices)", "cold, VCache storing (slices)"


@dataclass
class Cold:
    """Seconds to the first token of cold prompts, by server and length; as many of each server."""

    ttft_s: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))

    def storing(self, length: int) -> list[float]:
        """Of each prompt: what it took while stored, over the mean of the two servers without VCache."""
        return [
            2 * stored / (one + other)
            for stored, one, other in zip(
                *(self.ttft_s[name, length] for name in (STORING, COLD, TWIN)), strict=True
            )
        ]

    def between_twins(self, length: int) -> list[float]:
        """Of each prompt: the ratio of the two servers that do the same."""
        return [a / b for a, b in zip(self.ttft_s[TWIN, length], self.ttft_s[COLD, length], strict=True)]


def measure(where: Folder, pool: Child, ports: dict[str, int], prompts: Prompts, cold: Cold) -> None:
    """Ask all prompts, each of all servers, in all orders. pool: the metadata server. ports: of COLD, TWIN
    and STORING. Raises RuntimeError if not all was stored.
    """
    where.only(ports[STORING])
    before = metric(ports[STORING], STORED)
    orders = list(permutations(ports))
    for length, number, prompt in in_turns(prompts):
        names = orders[(number + length) % len(orders)]
        for name in names:
            where.only(ports[name])
            stir(ports[name], number)
        with where.tied(ports[STORING], pool):
            found = ttft_in_slices(where, [ports[name] for name in names], prompt)
        for name, seconds in zip(names, found, strict=True):
            cold.ttft_s[name, length].append(seconds)
        where.only(ports[STORING])
        forget(ports[STORING])  # which waits until all is stored
    stir(ports[STORING], 0)
    stored = metric(ports[STORING], STORED) - before
    wanted = sum(length // BLOCK_TOKENS * len(each) for length, each in prompts.items())
    if stored < wanted:
        raise RuntimeError(f"{stored:.0f} chunks were stored, wanted {wanted}")


def add_rows(table: Table, cold: Cold, lengths: Sequence[int]) -> bool:
    """What was found, a column for each length; whether it is what is wanted."""
    table.add_row(
        f"cold, storing / cold (wanted ≤ {RATIO_MAX})", *(_ratio(cold.storing(each)) for each in lengths)
    )
    table.add_row("two servers that do the same", *(_ratio(cold.between_twins(each)) for each in lengths))
    return all(statistics.median(cold.storing(each)) <= RATIO_MAX for each in lengths)


def _ratio(ratios: list[float]) -> str:
    low, high = median_range(ratios)
    return f"{statistics.median(ratios):.3f} ({low:.2f}-{high:.2f})"


def main() -> int:
    """Measure, print; 0 if the wanted bound is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--lengths", nargs="+", type=at_least_one, default=list(LENGTHS), help="of prompts, in tokens"
    )
    parser.add_argument("--prompts", type=at_least_one, default=12, help="of each length, and start (12)")
    parser.add_argument("--starts", type=at_least_one, default=2, help="of all servers, each anew (2)")
    parser.add_argument(
        "--step-tokens", type=at_least_one, default=STEP_TOKENS, help=f"of a step at most ({STEP_TOKENS})"
    )
    parser.add_argument("--cores", default="0-1", help="as VLLM_CPU_OMP_THREADS_BIND says them (0-1)")
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/")
    options = parser.parse_args()
    if max(options.lengths) > PROMPT_TOKENS_MAX:
        parser.error(f"--lengths: got {max(options.lengths)}, wanted at most {PROMPT_TOKENS_MAX}")
    console = Console(width=130, record=True)
    console.print(machine())
    good = True
    for label, base, model in made_models(options.models):
        cold = Cold()
        for start in range(options.starts):
            with folder(base / f"{label}-{start}") as where:
                _start_and_measure(where, model, options, cold)
        title = f"{label}, {fast_dtype()}, steps of {options.step_tokens} tokens: medians"
        good &= _report(console, title, cold, options.lengths)
    if options.write:
        keep(console, "What storing costs", "vllm-storing")
    return 0 if good else 1


def _start_and_measure(where: Folder, model: Path, options: argparse.Namespace, cold: Cold) -> None:
    pool = where.start_pool()
    ports: dict[str, int] = {}
    for name in (COLD, TWIN, STORING):
        transfer = where.vcache(SEGMENT) if name == STORING else None
        ports[name] = where.start_vllm(model, options.cores, transfer, step_tokens=options.step_tokens)
        where.only(ports[name])
        warm(ports[name])
        where.stop_all()
    measure(
        where, pool, ports, {each: random_prompts(2, each, options.prompts) for each in options.lengths}, cold
    )


def _report(console: Console, title: str, cold: Cold, lengths: Sequence[int]) -> bool:
    table = Table("TTFT in ms", *map(str, lengths), title=title)
    for name in (COLD, TWIN, STORING):
        found = [statistics.median(cold.ttft_s[name, length]) * 1e3 for length in lengths]
        table.add_row(name, *(f"{each:.0f}" for each in found))
    table.add_section()
    good = add_rows(table, cold, lengths)
    console.print(table)
    console.print(MEDIAN_RANGE_SAYS)
    return good


if __name__ == "__main__":
    sys.exit(main())
