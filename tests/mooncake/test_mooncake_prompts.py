"""A prompt's KV through Mooncake: to a process with another pool and another metadata server, as on another
machine, over TCP; and through a holder's SSD.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.mooncake.store import LAYOUT, MIB, Store, chunk, is_here, key, let_go, offload_files
from tests.mooncake.test_mooncake_tier import here_now
from tests.processes.content import LAYOUT as KV_LAYOUT
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S, Worker, eventually

CHUNK = KV_LAYOUT.chunk_tokens
PROMPT = 20 * CHUNK


def engine(pool: Pool, store: Store, **given: Any) -> Worker:
    """An engine with Mooncake under its pool, from its configuration alone."""
    settings = {f"tiers.mooncake.{name}": value for name, value in store.settings().items()}
    return pool.engine(**{"tiers.order": "mooncake", **settings, "tiers.deadline_ms": 60_000, **given})


def flush(child: Any) -> bool:
    """In a worker: have everything written below."""
    return bool(child.engine.flush_tiers(DEADLINE_S))


def test_another_machine_hits() -> None:
    with Store() as store:
        store.holder()
        with Pool() as one, Pool() as other:
            one.start_server()
            other.start_server()
            writer = engine(one, store, size="2MiB")
            writer.call("store", 1, PROMPT)
            assert writer.call("run", flush)
            assert writer.call("stats")["tier_written_chunks"] == 20
            reader = engine(other, store, size="2MiB")
            assert reader.call("lookup", 1, PROMPT) == PROMPT
            assert reader.call("retrieve", 1, PROMPT) == (PROMPT, 0)
            writer.kill()
            assert engine(other, store).call("retrieve", 1, PROMPT) == (PROMPT, 0)
            one.assert_nothing_leaks()
            other.assert_nothing_leaks()


def test_what_the_pool_evicts_is_written_back() -> None:
    with Store() as store, Pool() as one, Pool() as other:
        store.holder()
        one.start_server()
        other.start_server()
        writer = engine(one, store, size="2MiB", **{"tiers.policy": "write-back"})
        for seed in range(1, 21):  # half of them fit
            writer.call("store", seed, PROMPT)
        assert writer.call("run", flush)
        assert 0 < writer.call("stats")["tier_written_chunks"] < 20 * 20
        reader = engine(other, store, size="2MiB")
        for each, seeds in ((reader, (1, 2)), (writer, range(1, 21))):
            hits = [tuple(each.call("retrieve", seed, PROMPT)) for seed in seeds]
            assert all(wrong == 0 for _, wrong in hits)
            assert hits == [(PROMPT, 0)] * len(hits) or one.counters()["evicted_unsaved"] > 0
        one.assert_nothing_leaks()
        other.assert_nothing_leaks()


def test_both_tiers_in_order(tmp_path: Path) -> None:
    """What Mooncake gave is in the pool then; each tier is written through a queue of its own."""
    with Store() as store, Pool() as pool:
        store.holder()
        pool.start_server()
        rocks = {"tiers.order": "rocksdb, mooncake", "tiers.rocksdb.directory": str(tmp_path / "tier")}
        both = engine(pool, store, size="2MiB", **rocks)
        both.call("store", 1, PROMPT)
        assert both.call("run", flush)
        assert both.call("stats")["tier_written_chunks"] == 40
        pool.assert_nothing_leaks()


def test_a_holders_ssd_outlives_the_holder(tmp_path: Path) -> None:
    """Offloaded, the holder ends in order and comes back: what it had written is read again."""
    buckets = {
        "MOONCAKE_OFFLOAD_BUCKET_SIZE_LIMIT_BYTES": str(2 * MIB),
        "MOONCAKE_OFFLOAD_BUCKET_KEYS_LIMIT": "2",
    }
    with Store(offload=True) as store:
        folder = tmp_path / "ssd"
        first = store.holder(environment=buckets, offload_directory=str(folder))
        tier = store.tier()
        for number in range(8):
            assert tier.put(key(number), chunk(number), LAYOUT)
        eventually(lambda: offload_files(folder) >= 6 * MIB, "chunks are offloaded")
        first.call("run", let_go)
        first.kill()
        store.holder(environment=buckets, offload_directory=str(folder))
        eventually(lambda: any(here_now(tier, number) for number in range(8)), "the holder is back")
        assert sum(here_now(tier, number) for number in range(8)) >= 2


def test_the_test_has_an_eye() -> None:
    """`is_here` refuses wrong bytes: what the tests above rest on."""
    with Store() as store:
        store.holder()
        tier = store.tier()
        tier.put(key(1), chunk(2), LAYOUT)
        try:
            is_here(tier, 1)
        except AssertionError:
            return
        raise AssertionError("wrong bytes went unnoticed")
