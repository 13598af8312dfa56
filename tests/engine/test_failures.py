"""What an engine does when the pool has lost chunks: reads lower tiers, or misses, and never wrong bytes."""

from __future__ import annotations

import _thread
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.processes.content import LAYOUT, prompt
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S
from tests.support.engines import CHUNK, KEYS, counted, load, make, store
from vcache.engine import Location, VCacheEngine
from vcache.tiers import Found, MemoryTier

# -- lower tiers


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C is heard, also where a shell has started this in its background, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_chunk_that_the_pool_lost_comes_from_the_tier_and_is_promoted(pool: Pool) -> None:
    tier = MemoryTier(1 << 20)
    keys = KEYS.keys(prompt(40, 3 * CHUNK), CHUNK)
    with make(pool, tiers=[tier], size="1MiB") as engine:
        store(engine, 40, 3 * CHUNK + 1)
        assert engine.flush_tiers(DEADLINE_S)
        assert tier.contains(keys) == [True] * 3
        assert counted(engine, "tier_written_chunks", "client_pinned") == [3, 0]
        pool.observer.remove(keys[1:2])
        assert [engine.contains(key) for key in keys] == [Location.POOL, Location.LOWER_TIER, Location.POOL]
        assert engine.lookup(prompt(40, 3 * CHUNK)) == 3 * CHUNK
        assert load(engine, 40, 3 * CHUNK) == [True] * 3 * CHUNK
        assert engine.contains(keys[1]) is Location.POOL
        assert counted(engine, "tier_hits", "tier_promoted_chunks") == [1, 1]
        assert engine.contains(b"?" * 32) is Location.NOWHERE


def test_many_chunks_come_from_the_tier_in_several_turns(pool: Pool) -> None:
    tier = MemoryTier(1 << 20)
    with make(pool, tiers=[tier], size="1MiB") as engine:
        store(engine, 41, 20 * CHUNK)
        assert engine.flush_tiers(DEADLINE_S)
        pool.observer.remove(KEYS.keys(prompt(41, 20 * CHUNK), CHUNK))
        tier.remove(KEYS.keys(prompt(41, 19 * CHUNK), CHUNK)[18:])
        assert engine.lookup(prompt(41, 20 * CHUNK)) == 18 * CHUNK
        assert load(engine, 41, 20 * CHUNK) == [True] * 18 * CHUNK + [False] * 2 * CHUNK
        assert counted(engine, "tier_promoted_chunks") == [18]


def test_a_full_queue_drops_and_counts(pool: Pool) -> None:
    tier = MemoryTier(1 << 20)
    with make(pool, tiers=[tier], size="1MiB", engine={"tier_queue_chunks": 2}) as engine:
        store(engine, 42, 6 * CHUNK)
        assert engine.flush_tiers(DEADLINE_S)
        written, dropped = counted(engine, "tier_written_chunks", "tier_dropped_chunks")
        assert (written, dropped, len(tier)) == (2, 4, 2)
        assert load(engine, 42, 6 * CHUNK) == [True] * 6 * CHUNK


def test_what_is_being_written_below_is_forgotten_too(pool: Pool) -> None:
    writing, go = threading.Event(), threading.Event()

    class Held(MemoryTier):
        def put(self, key: bytes, chunk: torch.Tensor, layout: bytes, expires_ms: int = 0) -> bool:
            writing.set()
            assert go.wait(DEADLINE_S)
            return super().put(key, chunk, layout, expires_ms)

    tier = Held(1 << 20)
    with make(pool, tiers=[tier], size="1MiB") as engine:
        store(engine, 43, 3 * CHUNK)
        assert writing.wait(DEADLINE_S)
        engine.clear()
        go.set()
        assert engine.flush_tiers(DEADLINE_S)
        assert len(tier) == 0
        assert engine.lookup(prompt(43, 3 * CHUNK)) == 0


@pytest.mark.parametrize("prefetch", [False, True])
def test_what_is_forgotten_while_it_comes_up_does_not_stay(pool: Pool, prefetch: bool) -> None:
    reading, go = threading.Event(), threading.Event()

    class Held(MemoryTier):
        def get(self, key: bytes, into: torch.Tensor, layout: bytes) -> Found | None:
            found = super().get(key, into, layout)
            reading.set()
            assert go.wait(DEADLINE_S)
            return found

    tier = Held(1 << 20)
    keys = KEYS.keys(prompt(44, 3 * CHUNK), CHUNK)
    with make(pool, tiers=[tier], size="1MiB", **{"tiers.prefetch": prefetch}) as engine:
        store(engine, 44, 3 * CHUNK)
        assert engine.flush_tiers(DEADLINE_S)
        pool.observer.remove(keys)
        if prefetch:
            engine.lookup(prompt(44, 3 * CHUNK))
        retrieving = threading.Thread(target=load, args=(engine, 44, 3 * CHUNK))
        retrieving.start()
        assert reading.wait(DEADLINE_S)
        engine.remove(keys[:2])
        go.set()
        retrieving.join(DEADLINE_S)
        assert pool.observer.contains(keys[:2]) == [False, False]
    pool.check()


def interrupted_below(pool: Pool, seed: int, before: Callable[[VCacheEngine], None]) -> None:
    """Retrieve a chunk that only a tier has, interrupted after `before`; the call of the tier goes on."""
    go, has_read = threading.Event(), threading.Event()

    class Slow(MemoryTier):
        def get(self, key: bytes, into: torch.Tensor, layout: bytes) -> Found | None:
            before(engine)
            _thread.interrupt_main()
            assert go.wait(DEADLINE_S)
            found = super().get(key, into, layout)  # which would end the process if it were not mapped
            has_read.set()
            return found

    tier = Slow(1 << 20)
    with make(pool, device="shm:1", tiers=[tier]) as engine:
        store(engine, seed, CHUNK)
        assert engine.flush_tiers(DEADLINE_S)
        pool.observer.remove(KEYS.keys(prompt(seed, CHUNK), CHUNK))
        with pytest.raises(KeyboardInterrupt):
            load(engine, seed, CHUNK)
        held = pool.counters()["reservations"]
        go.set()
        assert has_read.wait(DEADLINE_S)
        wait_until(lambda: pool.counters()["reservations"] == 0)
        assert held == bool(pool.statistics().segments), "the extent is lent until the call has returned"
        assert lower_answers(engine)


def lower_answers(engine: VCacheEngine) -> bool:
    """Whether its tier is asked again, at the latest after a pause."""
    lower = engine._lower
    wait_until(lambda: lower.apart()[0].is_available)
    return lower.contains([b"?" * 32]) == [False]


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_leaves_what_a_tier_still_reads_into_reserved() -> None:
    with Pool() as own:
        own.start_server()
        own.start_holder("shm:0", "1MiB")
        interrupted_below(own, 45, lambda engine: None)
        own.check()


@pytest.mark.usefixtures("interrupts")
def test_what_a_tier_still_reads_into_stays_mapped_when_its_holder_dies() -> None:
    with Pool() as own:
        own.start_server()
        holder = own.engine(size="1MiB")

        def die(engine: VCacheEngine) -> None:
            (segment,) = own.statistics().segments
            lineage = engine._client._requests.connection().lineage
            assert engine._client.segment(segment.segment, lineage) is not None
            holder.kill()
            wait_until(lambda: engine._client.segment(segment.segment, lineage) is None)

        interrupted_below(own, 46, die)
        own.check()


def test_a_retrieve_does_not_wait_for_what_others_wanted_before(pool: Pool) -> None:
    reading, go = threading.Event(), threading.Event()
    slow = KEYS.keys(prompt(47, CHUNK), CHUNK)

    class Held(MemoryTier):
        def get(self, key: bytes, into: torch.Tensor, layout: bytes) -> Found | None:
            if key in slow:
                reading.set()
                assert go.wait(DEADLINE_S)
            return super().get(key, into, layout)

    tier = Held(1 << 20)
    with make(pool, tiers=[tier], size="1MiB", **{"tiers.prefetch": True}) as engine:
        for seed in (47, 48):
            store(engine, seed, CHUNK)
        assert engine.flush_tiers(DEADLINE_S)
        for seed in (47, 48):
            pool.observer.remove(KEYS.keys(prompt(seed, CHUNK), CHUNK))
            assert engine.lookup(prompt(seed, CHUNK)) == CHUNK
            assert reading.wait(DEADLINE_S)
        assert load(engine, 48, CHUNK) == [True] * CHUNK, "behind one that hangs"
        go.set()
        assert load(engine, 47, CHUNK) == [True] * CHUNK
    pool.check()


# -- when things go wrong


def test_a_pool_that_is_too_small_keeps_the_prefix(pool: Pool) -> None:
    with Pool() as small:
        small.start_server()
        with make(small, size="128KiB") as engine:
            store(engine, 50, 64 * CHUNK)
            stored, unstored, full = counted(engine, "stored_chunks", "unstored_chunks", "failed_full_pool")
            assert 0 < stored < 64
            assert (stored + unstored, full) == (64, 1)
            assert engine.lookup(prompt(50, 64 * CHUNK)) == stored * CHUNK
            assert sum(load(engine, 50, 64 * CHUNK)) == stored * CHUNK
            for seed in range(51, 60):  # evicts what came before
                store(engine, seed, 4 * CHUNK)
            assert all(load(engine, 59, 4 * CHUNK))
            small.check()


def test_a_read_whose_extents_were_given_away_is_no_hit(pool: Pool, engine: VCacheEngine) -> None:
    with make(pool) as reader:
        store(engine, 60, 4 * CHUNK)
        keys = KEYS.keys(prompt(60, 4 * CHUNK), CHUNK)
        inside = reader._retrieve._pool
        grant = inside.acquire(keys)
        assert grant is not None
        with inside.borrowed(grant.extents, [LAYOUT.chunk_bytes] * 4, grant.lineage):
            assert inside.intact(grant, 0, 4)
            pool.observer.remove(keys[3:])
            assert not inside.intact(grant, 0, 4)
            assert inside.intact(grant, 0, 3)
        inside.release(grant)
        assert counted(reader, "failed_fence_broken") == [1]
        assert load(reader, 60, 4 * CHUNK) == [True] * 3 * CHUNK + [False] * CHUNK


def test_a_dead_server_is_a_miss_at_once_and_its_successor_serves_what_was_there() -> None:
    tier = MemoryTier(1 << 20)
    with Pool() as own:
        own.start_server()
        with make(own, size="1MiB", tiers=[tier]) as engine:
            store(engine, 70, 3 * CHUNK)
            assert engine.flush_tiers(DEADLINE_S)
            tier.remove(KEYS.keys(prompt(70, 3 * CHUNK), CHUNK)[2:])
            own.kill_server()
            wait_until(lambda: not engine.connected)
            # What the tier has can be had without the server.
            assert load(engine, 70, 3 * CHUNK) == [True] * 2 * CHUNK + [False] * CHUNK
            tier.clear()
            seconds = []
            for _ in range(200):
                started = time.perf_counter()
                assert engine.lookup(prompt(70, 3 * CHUNK)) == 0
                seconds.append(time.perf_counter() - started)
            assert statistics.median(seconds) < 1e-3
            store(engine, 71, CHUNK)
            assert counted(engine, "connected") == [0]
            own.start_server()
            assert engine.wait_connected(DEADLINE_S)
            assert load(engine, 70, 3 * CHUNK) == [True] * 3 * CHUNK
            own.check()


def test_a_dead_holder_is_a_miss() -> None:
    with Pool() as own:
        own.start_server()
        holder = own.engine(size="1MiB")
        holder.call("store", 80, 3 * CHUNK)
        with make(own, device="shm:1") as engine:
            assert load(engine, 80, 3 * CHUNK) == [True] * 3 * CHUNK
            holder.kill()
            wait_until(lambda: not own.statistics().segments)
            assert load(engine, 80, 3 * CHUNK) == [False] * 3 * CHUNK
            store(engine, 81, CHUNK)
            assert counted(engine, "failed_full_pool", "unstored_chunks") == [1, 1]
        own.check()


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll, yielding the processor, until `condition()` is true; AssertionError after DEADLINE_S."""
    changed, deadline_s = threading.Event(), time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        changed.wait(0.005)


def test_memory_that_a_device_cannot_reach_is_a_miss(engine: VCacheEngine) -> None:
    """As when an engine on a GPU is granted chunks of a segment in plain shared memory."""
    store(engine, 70, CHUNK)
    pool = engine._retrieve._pool
    grant = pool.acquire(KEYS.keys(prompt(70, CHUNK), CHUNK))
    assert grant is not None
    before = counted(engine, "failed_other_memory")[0]
    for kind, reached in (("cuda", False), ("cpu", True), (None, True)):
        with pool.borrowed(grant.extents, [LAYOUT.chunk_bytes], grant.lineage, kind) as (view,):
            assert (view is not None) == reached
    assert counted(engine, "failed_other_memory") == [before + 1]
    pool.release(grant)


def test_an_extent_that_cannot_be_costs_itself_only(engine: VCacheEngine) -> None:
    store(engine, 71, 3 * CHUNK)
    pool, size = engine._retrieve._pool, LAYOUT.chunk_bytes
    grant = pool.acquire(KEYS.keys(prompt(71, 3 * CHUNK), CHUNK))
    assert grant is not None
    broken = grant.extents.copy()
    broken["offset"][1] = 1 << 40
    before = counted(engine, "failed_malformed")[0]
    with pool.borrowed(broken, [size] * 3, grant.lineage) as views:
        assert [None if view is None else len(view) for view in views] == [size, None, size]
    assert counted(engine, "failed_malformed") == [before + 1]
    with pool.borrowed(grant.extents[:0], [], grant.lineage) as views:
        assert views == []
    pool.release(grant)
