"""What may go wrong around a real LMCacheEngine: it is a miss, and nothing leaks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.lmcache import engine
from tests.processes.content import prompt
from tests.processes.pool import Pool
from tests.processes.worker import eventually

CHUNK = engine.CHUNK_TOKENS
TOKENS = 10 * CHUNK


@pytest.mark.parametrize("way", [{}, {"use_layerwise": True}], ids=["sync", "layerwise"])
def test_what_a_holder_lends_outlives_writer_and_server(pool: Pool, way: dict[str, Any]) -> None:
    pool.start_holder(size="8MiB")
    writer = engine.start(pool, **way)
    writer.call("run", engine.store, 1, TOKENS)
    writer.kill()
    reader = engine.start(pool, **way)
    assert reader.call("run", engine.retrieve, 1, TOKENS) == (TOKENS, 0)
    pool.kill_server()
    assert reader.call("run", engine.retrieve, 1, TOKENS) == (0, 0)
    reader.call("run", engine.store, 2, TOKENS)
    pool.start_server()
    eventually(lambda: reader.call("run", engine.stats)["connected"], "the reader is back")
    assert reader.call("run", engine.retrieve, 1, TOKENS) == (TOKENS, 0)
    reader.call("run", engine.store, 3, TOKENS)
    assert reader.call("run", engine.retrieve, 3, TOKENS) == (TOKENS, 0)
    assert reader.call("run", engine.stats)["failures"] == 0
    reader.call("run", engine.close)
    pool.assert_nothing_leaks()


def test_a_writer_that_dies_with_its_segment_leaves_misses(pool: Pool) -> None:
    writer = engine.start(pool, size="8MiB")
    reader = engine.start(pool)
    writer.call("run", engine.store, 1, TOKENS)
    assert reader.call("run", engine.lookup, 1, TOKENS, "pinned") == TOKENS
    writer.kill()
    eventually(lambda: reader.call("run", engine.lookup, 1, TOKENS) == 0, "the segment has gone")
    hit, wrong = reader.call("run", engine.retrieve, 1, TOKENS, "pinned")
    assert wrong == 0 and hit in (0, TOKENS)  # what was pinned and mapped may still be read
    reader.call("run", engine.unpin, "pinned")
    reader.call("run", engine.close)
    pool.assert_nothing_leaks()


def test_what_is_pinned_survives_eviction_and_goes_with_its_process(pool: Pool) -> None:
    pool.start_holder(size="1MiB")
    first, second = engine.start(pool), engine.start(pool)
    first.call("run", engine.store, 1, TOKENS)
    assert first.call("run", engine.lookup, 1, TOKENS, "pinned") == TOKENS
    for seed in range(2, 40):
        second.call("run", engine.store, seed, TOKENS)
    assert second.call("run", engine.lookup, 2, TOKENS) == 0
    assert first.call("run", engine.retrieve, 1, TOKENS, "pinned") == (TOKENS, 0)
    assert pool.counters()["pins"] > 0
    first.kill()
    pool.eventually(lambda pool: pool.counters()["pins"] == 0, "its pins went with it")
    for seed in range(40, 80):
        second.call("run", engine.store, seed, TOKENS)
    assert second.call("run", engine.lookup, 1, TOKENS) == 0
    second.call("run", engine.close)
    pool.assert_nothing_leaks()


def test_an_unpinned_prompt_is_evicted_like_any_other(pool: Pool) -> None:
    pool.start_holder(size="1MiB")
    worker = engine.start(pool)
    worker.call("run", engine.store, 1, TOKENS)
    assert worker.call("run", engine.lookup, 1, TOKENS, "pinned") == TOKENS
    worker.call("run", engine.unpin, "pinned")
    for seed in range(2, 40):
        worker.call("run", engine.store, seed, TOKENS)
    assert worker.call("run", engine.lookup, 1, TOKENS) == 0
    worker.call("run", engine.close)
    pool.assert_nothing_leaks()


@pytest.mark.parametrize("way", [{}, {"use_layerwise": True}], ids=["sync", "layerwise"])
def test_a_pool_that_is_full_of_pins_stores_less(pool: Pool, way: dict[str, Any]) -> None:
    pool.start_holder(size="256KiB")
    holder, writer = engine.start(pool, **way), engine.start(pool, **way)
    seed = 0
    while True:  # until nothing more fits beside what is pinned
        seed += 1
        holder.call("run", engine.store, seed, TOKENS)
        if holder.call("run", engine.lookup, seed, TOKENS, f"pin {seed}") < TOKENS:
            break
        assert seed < 100
    writer.call("run", engine.store, 1000, 20 * CHUNK)
    hit, wrong = writer.call("run", engine.retrieve, 1000, 20 * CHUNK)
    assert hit < 20 * CHUNK and wrong == 0
    for pinned in range(1, seed + 1):
        holder.call("run", engine.unpin, f"pin {pinned}")
    writer.call("run", engine.store, 1001, 4 * CHUNK)
    assert writer.call("run", engine.retrieve, 1001, 4 * CHUNK) == (4 * CHUNK, 0)
    for worker in (holder, writer):
        assert worker.call("run", engine.stats)["failures"] == 0
        worker.call("run", engine.close)
    pool.assert_nothing_leaks()


@pytest.mark.parametrize("way", [{}, {"use_layerwise": True}], ids=["sync", "layerwise"])
def test_remove_and_clear_reach_other_processes(pool: Pool, way: dict[str, Any]) -> None:
    pool.start_holder(size="8MiB")
    one, other = engine.start(pool, **way), engine.start(pool, **way)
    for seed in (1, 2, 3):
        one.call("run", engine.store, seed, TOKENS)
    assert other.call("run", engine.clear, prompt(1, TOKENS)) == TOKENS // CHUNK
    assert one.call("run", engine.lookup, 1, TOKENS) == 0
    assert one.call("run", engine.lookup, 2, TOKENS) == TOKENS
    assert other.call("run", engine.clear) == 2 * TOKENS
    assert one.call("run", engine.lookup, 2, TOKENS) == 0
    one.call("run", engine.store, 1, TOKENS)
    assert other.call("run", engine.retrieve, 1, TOKENS) == (TOKENS, 0)
    for worker in (one, other):
        worker.call("run", engine.close)
    pool.assert_nothing_leaks()


def test_without_a_server_there_are_misses_and_no_errors(pool: Pool) -> None:
    pool.kill_server()
    worker = engine.start(pool, **{"vcache.client.connect_timeout_ms": 50})
    worker.call("run", engine.store, 1, TOKENS)
    assert worker.call("run", engine.retrieve, 1, TOKENS) == (0, 0)
    assert worker.call("run", engine.clear) == 0
    assert worker.call("run", engine.stats)["failures"] == 0
    worker.call("run", engine.close)
