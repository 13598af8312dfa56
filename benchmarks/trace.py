"""What a request trace hits in the pool, by pool size and policy, beside an unlimited pool and the optimum.

    python benchmarks/trace.py TRACE.jsonl [--blocks 2000,8000,30000] [--policy lru,s3fifo] [--limit N]
                               [--no-server] [--json]

TRACE is in the format that Mooncake published with its FAST '25 paper: one JSON object a line with
`timestamp`, `input_length`, `output_length` and `hash_ids`, the chain of the prompt's 512-token blocks. What
counts as a hit is said in `trace_sim.py`. Every policy at every size is simulated and replayed through a real
server (`trace_replay.py`), which must hit the very same blocks: otherwise the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import get_args

if __package__ in (None, ""):
    # Run as a script: import siblings as a package, and keep this file from passing for the standard `trace`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.report import machine
from benchmarks.trace_replay import replay_through_server
from benchmarks.trace_sim import (
    BLOCK_TOKENS,
    BeladyPool,
    Pool,
    Replay,
    Request,
    SimulatedPool,
    UnlimitedPool,
    load_trace,
    replay,
)
from metadata_server.eviction import PolicyName, make_policy
from vcache.errors import VCacheError

BLOCKS_DEFAULT = "2000,8000,30000"


@dataclass(frozen=True)
class Result:
    """One line of the table: a pool, its size in blocks (None: unlimited) what it hit, simulated or real."""

    pool: str
    blocks: int | None
    replay: Replay
    is_simulated: bool = True

    def as_json(self) -> dict[str, object]:
        rates = {
            "block_rate": round(self.replay.block_rate, 4),
            "token_rate": round(self.replay.token_rate, 4),
            "requests_per_s": round(self.replay.requests_per_s),
        }
        through = "simulation" if self.is_simulated else "server"
        pool = {"pool": self.pool, "pool_blocks": self.blocks, "through": through}
        return {**pool, **rates, **asdict(self.replay)}


def simulated(
    requests: Sequence[Request], sizes: Sequence[int], policies: Sequence[PolicyName], block_tokens: int
) -> Iterator[Result]:
    """Every policy at every size, then the optimum at every size, then the unlimited pool."""

    def result(name: str, blocks: int | None, pool: Pool) -> Result:
        return Result(name, blocks, replay(requests, pool, block_tokens))

    for policy in policies:
        for blocks in sizes:
            yield result(policy, blocks, SimulatedPool(blocks, make_policy(policy)))
    for blocks in sizes:
        yield result("belady", blocks, BeladyPool(blocks, requests))
    yield result("unlimited", None, UnlimitedPool())


def through_server(
    requests: Sequence[Request],
    sizes: Sequence[int],
    policies: Sequence[PolicyName],
    block_tokens: int,
    progress: Progress,
) -> Iterator[Result]:
    """Every policy at every size, through a server of its own."""
    for policy in policies:
        for blocks in sizes:
            name = f"server, {policy}, {blocks:,} blocks"
            track = partial(progress.track, total=len(requests), description=name)
            yield Result(
                policy, blocks, replay_through_server(requests, blocks, policy, block_tokens, track), False
            )


def differences(results: Sequence[Result]) -> list[str]:
    """What the server and the simulation do not agree on, in words; empty if they agree."""
    expected = {(each.pool, each.blocks): each.replay.hit_blocks for each in results if each.is_simulated}
    return [
        f"{each.pool}, {each.blocks:,} blocks: the server hit {each.replay.hit_blocks:,}, "
        f"the simulation {expected[each.pool, each.blocks]:,}"
        for each in results
        if not each.is_simulated and each.replay.hit_blocks != expected[each.pool, each.blocks]
    ]


def table(results: Iterable[Result], title: str) -> Table:
    """The results for people: a row for each pool and size."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("pool")
    shown.add_column("through")
    for heading in ("blocks", "hit (blocks)", "hit (tokens)", "requests/s"):
        shown.add_column(heading, justify="right")
    for result in results:
        shown.add_row(
            result.pool,
            "simulation" if result.is_simulated else "server",
            f"{result.blocks:,}" if result.blocks is not None else "∞",
            f"{result.replay.block_rate:.3f}",
            f"{result.replay.token_rate:.3f}",
            f"{result.replay.requests_per_s:,.0f}",
        )
    return shown


def sizes_of(text: str) -> list[int]:
    """Pool sizes from "2000,8000"; for argparse."""
    sizes = text.split(",")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted numbers of blocks, such as {BLOCKS_DEFAULT}")
    return [int(size) for size in sizes]


def number_of(what: str) -> Callable[[str], int]:
    """Parses a positive number of these; for argparse."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number of {what} of at least 1")
        return int(text)

    return parse


def policies_of(text: str) -> list[str]:
    """Policies from "lru,s3fifo"; for argparse."""
    names = text.split(",")
    if unknown := set(names) - set(get_args(PolicyName)):
        wanted = " or ".join(get_args(PolicyName))
        raise argparse.ArgumentTypeError(f"got {', '.join(sorted(unknown))!r}, wanted {wanted}")
    return names


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="trace.py", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("file", type=Path, help="the trace: JSON lines in Mooncake's FAST '25 format")
    parser.add_argument("--blocks", type=sizes_of, default=sizes_of(BLOCKS_DEFAULT), help="pool sizes")
    parser.add_argument("--policy", type=policies_of, default=list(get_args(PolicyName)), help="lru,s3fifo")
    parser.add_argument(
        "--block-tokens", type=number_of("tokens"), default=BLOCK_TOKENS, help="tokens of a block"
    )
    parser.add_argument("--limit", type=number_of("requests"), help="only that many requests, from the start")
    parser.add_argument("--no-server", action="store_true", help="only simulate: seconds instead of minutes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 1 if server and simulation differ, 2 if it could not be measured."""
    args = arguments(argv)
    try:
        requests = load_trace(args.file)[: args.limit]
        results = _measured(args, requests)
    except (OSError, VCacheError) as error:
        print(f"trace.py: {error}", file=sys.stderr)
        return 2
    wrong = differences(results)
    if args.json:
        shown = {"trace": args.file.name, "machine": machine(), "results": [r.as_json() for r in results]}
        print(json.dumps(shown, indent=2))
    else:
        Console().print(table(results, f"{args.file.name}: {len(requests):,} requests"))
        print(machine())
    for line in wrong:
        print(f"trace.py: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _measured(args: argparse.Namespace, requests: Sequence[Request]) -> list[Result]:
    points = requests, args.blocks, args.policy, args.block_tokens
    with Progress(console=Console(stderr=True), transient=True) as progress:
        steps = len(args.blocks) * (len(args.policy) + 1) + 1
        results = list(progress.track(simulated(*points), total=steps, description="simulating"))
        if not args.no_server:
            results += through_server(*points, progress)
    return results


if __name__ == "__main__":
    sys.exit(main())
