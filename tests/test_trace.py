"""Replaying a trace: figures hold the convention of what is a hit, the optimum is one, errors."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import trace
from benchmarks.trace_sim import (
    BeladyPool,
    Pool,
    Request,
    SimulatedPool,
    UnlimitedPool,
    key_of_id,
    load_trace,
    replay,
)
from metadata_server.eviction import make_policy
from vcache.errors import ArgumentError

Chains = list[list[int]]


def requests_of(chains: Sequence[Sequence[int]]) -> list[Request]:
    return [Request(len(chain) * 512, [key_of_id(block) for block in chain]) for chain in chains]


def conversations(seed: int, turns: int) -> Chains:
    """Turns of many interleaved conversations behind one system prompt; each turn repeats those before it."""
    source = random.Random(seed)
    fresh = iter(range(1, 1_000_000)).__next__
    open_chains: Chains = []
    played: Chains = []
    for _ in range(turns):
        if len(open_chains) < 4 or source.random() < 0.4:
            open_chains.append([0])
        turn = int(source.random() ** 2 * len(open_chains))  # old conversations more often than new ones
        open_chains[turn] = open_chains[turn] + [fresh() for _ in range(source.randint(1, 12))]
        played.append(open_chains[turn])
        if len(open_chains) > 60:
            open_chains.pop(source.randrange(60))
    return played


def lru_by_hand(chains: Chains, capacity: int) -> int:
    """Hits under LRU, written out from the convention with a plain list, coldest block first."""
    cached: list[int] = []
    hits = 0
    for chain in chains:
        prefix = []
        for block in chain:
            if block not in cached:
                break
            prefix.append(block)
        hits += len(prefix)
        for block in reversed(prefix):
            cached.remove(block)
            cached.append(block)
        present = [block for block in chain if block in cached]
        missing = [block for block in chain if block not in cached]
        for block in [block for block in cached if block not in chain]:
            if len(cached) + len(missing) > capacity:
                cached.remove(block)
        cached.extend(reversed(missing[: capacity - len(cached)]))
        for block in reversed(present):
            cached.remove(block)
            cached.append(block)
    return hits


@pytest.mark.parametrize("capacity", [20, 100, 400])
def test_lru_hits_are_those_of_the_convention_by_hand(capacity: int) -> None:
    chains = conversations(seed=1, turns=400)

    simulated = replay(requests_of(chains), SimulatedPool(capacity, make_policy("lru")))

    assert simulated.hit_blocks == lru_by_hand(chains, capacity)


def test_the_figures_of_a_seeded_trace_stay() -> None:
    """Exact hits: an order of touches, insertions or evictions other than the documented changes them."""
    requests = requests_of(conversations(seed=7, turns=800))

    def hits(pool: Pool) -> int:
        return replay(requests, pool).hit_blocks

    sizes = (100, 400, 1_600)
    assert sum(len(request.keys) for request in requests) == 42_003
    assert [hits(SimulatedPool(size, make_policy("lru"))) for size in sizes] == [6_178, 22_332, 36_606]
    assert [hits(SimulatedPool(size, make_policy("s3fifo"))) for size in sizes] == [6_421, 23_187, 35_449]
    assert [hits(BeladyPool(size, requests)) for size in sizes] == [12_291, 30_147, 36_905]
    assert hits(UnlimitedPool()) == 36_905


def test_only_the_prefix_before_a_gap_is_a_hit() -> None:
    pool = SimulatedPool(3, make_policy("lru"))
    a, b, c, d = (key_of_id(block) for block in range(4))
    pool.store([b, c])

    assert pool.prefix_hit([a, b, c]) == 0
    assert pool.store([a, b, c]) == 1
    assert pool.prefix_hit([a, b, c, d]) == 3


def test_a_store_spares_the_request_own_blocks() -> None:
    pool = SimulatedPool(3, make_policy("lru"))
    a, b, c, other = (key_of_id(block) for block in range(4))
    pool.store([a])
    pool.store([other])

    assert pool.store([a, b, c]) == 2
    assert pool.prefix_hit([a, b, c]) == 3
    assert pool.prefix_hit([other]) == 0


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_of_a_request_longer_than_the_pool_the_head_is_stored(policy: str) -> None:
    pool = SimulatedPool(4, make_policy(policy))  # type: ignore[arg-type]
    keys = [key_of_id(block) for block in range(10)]
    pool.store(keys[:2])

    assert pool.store(keys) == 2
    assert pool.prefix_hit(keys) == 4


def test_a_block_twice_in_one_request_is_stored_once() -> None:
    pool = SimulatedPool(4, make_policy("lru"))
    a, b = key_of_id(0), key_of_id(1)

    assert pool.store([a, b, a]) == 2
    assert pool.prefix_hit([a, b]) == 2


def test_tokens_of_a_last_block_that_is_not_full() -> None:
    keys = [key_of_id(0), key_of_id(1)]
    result = replay([Request(700, keys), Request(700, keys)], UnlimitedPool())

    assert (result.hit_blocks, result.hit_tokens) == (2, 700)
    assert (result.block_rate, result.token_rate) == (0.5, 0.5)


# --- the optimum --------------------------------------------------------------------------------------------


def best_by_trying_all(chains: Chains, capacity: int) -> int:
    """The most prefix hits that any choice of what to keep after each request can reach."""

    @cache
    def best(position: int, cached: frozenset[int]) -> int:
        if position == len(chains):
            return 0
        chain = chains[position]
        hit = next((n for n, block in enumerate(chain) if block not in cached), len(chain))
        at_hand = cached | set(chain)
        kept = combinations(sorted(at_hand), min(capacity, len(at_hand)))
        return hit + max(best(position + 1, frozenset(choice)) for choice in kept)

    return best(0, frozenset())


def chain_in_a_tree(path: list[bool]) -> list[int]:
    """The nodes on a path down a binary tree, below its root: so that equal blocks have equal prefixes."""
    chain, node = [], 1
    for right in path:
        node = node * 2 + right
        chain.append(node)
    return chain


CHAINS = st.lists(st.lists(st.booleans(), min_size=1, max_size=3).map(chain_in_a_tree), max_size=7)


@settings(max_examples=60)
@given(chains=CHAINS, capacity=st.integers(1, 4))
def test_belady_is_the_optimum(chains: Chains, capacity: int) -> None:
    requests = requests_of(chains)
    belady = replay(requests, BeladyPool(capacity, requests)).hit_blocks

    assert belady == best_by_trying_all(chains, capacity)
    for policy in ("lru", "s3fifo"):
        pool = SimulatedPool(capacity, make_policy(policy))
        assert replay(requests, pool).hit_blocks <= belady


@settings(max_examples=60)
@given(chains=CHAINS)
def test_a_pool_that_holds_everything_is_like_an_unlimited_one(chains: Chains) -> None:
    requests = requests_of(chains)
    unlimited = replay(requests, UnlimitedPool()).hit_blocks

    assert replay(requests, BeladyPool(100, requests)).hit_blocks == unlimited
    assert replay(requests, SimulatedPool(100, make_policy("s3fifo"))).hit_blocks == unlimited


# --- the file and the command line --------------------------------------------------------------------------


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    lines = [
        {"timestamp": 0, "input_length": 1_000, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 3_000, "input_length": 1_300, "output_length": 5, "hash_ids": [0, 1, 2]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_load_trace(trace_file: Path) -> None:
    first, second = load_trace(trace_file)

    assert (first.tokens, second.tokens) == (1_000, 1_300)
    assert list(second.keys[:2]) == list(first.keys)
    assert all(len(key) == 32 for key in second.keys)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"input_length": 3}', "hash_ids"),
        ('{"input_length": 3, "hash_ids": ["a"]}', r"\$\.hash_ids\[0\]"),
        ('{"input_length": -1, "hash_ids": []}', r"\$\.input_length"),
        ("{", "line 2"),
    ],
)
def test_a_wrong_line_is_named(trace_file: Path, line: str, named: str) -> None:
    trace_file.write_text('{"input_length": 3, "hash_ids": [1]}\n' + line + "\n")

    with pytest.raises(ArgumentError, match=r"line 2.*" + named if named != "line 2" else named):
        load_trace(trace_file)


def test_a_trace_without_requests_is_an_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")

    with pytest.raises(ArgumentError, match="no requests"):
        load_trace(empty)


def test_command_line_as_a_script(trace_file: Path) -> None:
    command = [
        sys.executable,
        trace.__file__,
        str(trace_file),
        "--blocks=2,8",
        "--policy=lru",
        "--json",
        "--no-server",
    ]
    elsewhere = trace_file.parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=elsewhere)
    rows = json.loads(done.stdout)["results"]

    assert [(row["pool"], row["pool_blocks"], row["hit_blocks"]) for row in rows] == [
        ("lru", 2, 2),
        ("lru", 8, 2),
        ("belady", 2, 2),
        ("belady", 8, 2),
        ("unlimited", None, 2),
    ]


def test_command_line_prints_a_table(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace.main([str(trace_file), "--blocks", "8", "--no-server"]) == 0

    shown = capsys.readouterr().out
    assert "2 requests" in shown
    assert "0.400" in shown


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--blocks", "3,x"], "wanted numbers of blocks"),
        (["--blocks", "0"], "wanted numbers of blocks"),
        (["--policy", "lfu"], "wanted lru or s3fifo"),
        (["--block-tokens", "0"], "wanted a number of tokens"),
        (["--limit", "no"], "wanted a number of requests"),
    ],
)
def test_wrong_arguments_say_what_is_wanted(
    arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        trace.main(["trace.jsonl", *arguments])

    assert wanted in capsys.readouterr().err


def test_a_missing_file_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace.main([str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
