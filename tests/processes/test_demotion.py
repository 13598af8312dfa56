"""Host memory under what engines store to: demotion, promotion, and the deaths of those who copy."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.processes.content import LAYOUT, prompt
from tests.processes.devices import GPUS
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S, all_stopped, eventually
from vcache.keys import KeyChain

CHUNK = LAYOUT.chunk_tokens
PROMPT = (40 if GPUS else 4) * CHUNK
SMALL = 4096 + 10 * 8192
"""A segment with room for ten chunks; on a GPU, whose segments are of 2 MiB at least, for 255."""
PROMPTS = range(1, 9)


@pytest.fixture
def pool() -> Iterator[Pool]:
    """A server. Whatever the test did: in the end nothing leaks."""
    with Pool() as pool:
        pool.start_server()
        yield pool
        pool.assert_nothing_leaks()


def wait_long(child: Any) -> None:
    """In a worker: stores wait for what is being copied as long as it takes."""
    from vcache.engine import pool

    pool.SAVE_WAIT_S = DEADLINE_S  # type: ignore[misc]


def where(child: Any, seed: int) -> set[str]:
    """In a worker: where the chunks of a prompt are."""
    keys = KeyChain(LAYOUT.fingerprint, "test-model").keys(prompt(seed, PROMPT), CHUNK)
    return {child.engine.contains(key).name for key in keys}


def used(pool: Pool) -> dict[int, int]:
    """Bytes of chunks by rank."""
    found: dict[int, int] = {}
    for row in pool.statistics().segments:
        found[row.rank] = found.get(row.rank, 0) + row.committed_bytes
    return found


def engine(pool: Pool, **given: Any) -> Any:
    worker = pool.engine(**given)
    worker.call("run", wait_long)
    return worker


def test_what_rank_0_evicts_is_in_rank_1_and_comes_back(pool: Pool) -> None:
    pool.start_holder("shm:0", SMALL)
    pool.start_holder("shm:1", "2MiB", rank=1)
    worker = engine(pool)
    for seed in PROMPTS:
        worker.call("store", seed, PROMPT)
    assert used(pool)[1] > 0
    assert all(worker.call("run", where, seed) == {"POOL"} for seed in PROMPTS)
    for seed in PROMPTS:
        assert worker.call("retrieve", seed, PROMPT) == (PROMPT, 0)
    pool.eventually(
        lambda pool: pool.counters()["copies_done"] == pool.counters()["copies_given_out"], "quiet"
    )
    assert pool.counters()["evicted_unsaved"] == 0
    first = PROMPTS[0]
    worker.call("retrieve", first, PROMPT)

    def is_back(pool: Pool) -> bool:
        chunks = pool.observer.list(limit=1000).rows
        keys = set(KeyChain(LAYOUT.fingerprint, "test-model").keys(prompt(first, PROMPT), CHUNK))
        ranks = {row.segment: row.rank for row in pool.statistics().segments}
        return {row.key for row in chunks if ranks[row.segment] == 0} >= keys

    pool.eventually(is_back, "what was used is in rank 0 again")
    assert worker.call("retrieve", first, PROMPT) == (PROMPT, 0)


def test_an_engine_demotes_from_its_own_segment(pool: Pool) -> None:
    pool.start_holder("shm:1", "2MiB", rank=1)
    worker = engine(pool, size=SMALL)
    for seed in PROMPTS:
        worker.call("store", seed, PROMPT)
    for seed in PROMPTS:
        assert worker.call("retrieve", seed, PROMPT) == (PROMPT, 0)


def test_an_engine_may_lend_the_rank_below(pool: Pool) -> None:
    """`segment.rank` of the configuration."""
    pool.start_holder("shm:0", SMALL)
    under = pool.engine(device="shm:1", size="2MiB", **{"segment.rank": 1})
    worker = engine(pool)
    for seed in PROMPTS:
        worker.call("store", seed, PROMPT)
    assert {row.rank for row in pool.statistics().segments} == {0, 1}
    assert used(pool)[1] > 0
    assert under.call("retrieve", 1, PROMPT) == (PROMPT, 0)


def test_the_holder_that_copies_is_stopped_and_killed(pool: Pool) -> None:
    """Stores go on: what it has under way stays its, everything else goes uncopied. Then it dies."""
    holder, segment = pool.start_holder("shm:0", SMALL)
    pool.start_holder("shm:1", "2MiB", rank=1)
    worker = pool.engine()
    for seed in PROMPTS:
        worker.call("store", seed, PROMPT)
    os.kill(holder.pid, signal.SIGSTOP)
    eventually(lambda: all_stopped(holder.pid), "the holder stops")
    for seed in range(20, 30):
        worker.call("store", seed, PROMPT)
        pool.check()
    assert worker.call("retrieve", 29, PROMPT)[1] == 0
    assert pool.counters()["evicted_unsaved"] > 0
    holder.kill()
    pool.eventually(
        lambda pool: segment not in {row.segment for row in pool.statistics().segments}, "it is buried"
    )
    pool.check()
    hits = [worker.call("retrieve", seed, PROMPT) for seed in PROMPTS]
    assert all(wrong == 0 for _, wrong in hits)
    assert sum(tokens for tokens, _ in hits) > 0, "what had been demoted is there still"


def store_many(child: Any, first: int, count: int) -> None:
    """In a worker."""
    for seed in range(first, first + count):
        child.store(seed, PROMPT)


def test_the_server_is_killed_amid_copies(pool: Pool) -> None:
    pool.start_holder("shm:0", SMALL)
    pool.start_holder("shm:1", "1MiB", rank=1)
    worker = pool.engine()
    firsts = itertools.count(0, 30)

    def store_until_copied() -> None:
        """A server counts anew, and what has a replica goes without a copy: so some stores may need none."""
        while not copies(pool):
            worker.call("run", store_many, next(firsts), 30)

    for _ in range(3):
        store_until_copied()
        first = next(firsts)
        worker.send("run", store_many, first, 30)
        pool.kill_server()
        pool.start_server()
        worker.result()
        assert worker.call("run", connected)
        hits = [worker.call("retrieve", seed, PROMPT) for seed in range(first, first + 30)]
        assert all(wrong == 0 for _, wrong in hits)
        pool.check()
    store_until_copied()


def copies(pool: Pool) -> bool:
    return pool.counters().get("copies_done", 0) > 0


def connected(child: Any) -> bool:
    """In a worker."""
    return bool(child.engine.wait_connected(DEADLINE_S))
