"""The queue to a lower tier: who stores waits neither for the tier nor for the pins of what is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from tests.client_pool import Pool as Processes
from tests.client_pool import pool_in_memory
from tests.processes.content import LAYOUT
from tests.processes.worker import DEADLINE_S, eventually
from tests.support.lending_client import lending_client
from vcache.client import Client, Grant
from vcache.config import load
from vcache.engine.chunks import Chunks
from vcache.engine.lanes import Lanes
from vcache.engine.lower import LowerTiers, OneTier
from vcache.engine.passages import Passages
from vcache.engine.pool import Pool
from vcache.engine.prefetch import Prefetch
from vcache.engine.stats import Counters
from vcache.engine.tier_calls import TierCalls
from vcache.engine.tier_queue import TierQueue, TierQueues
from vcache.engine.tier_work import TierWork
from vcache.tiers import MemoryTier

KEYS = [bytes([number]) * 32 for number in range(3)]


class SlowPool(Pool):
    """What is acquired is granted when the test lets it be."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked, self.go = threading.Event(), threading.Event()

    def acquire(self, keys: Sequence[bytes], *, pin: bool = False, prefix: bool = True) -> Grant | None:
        self.asked.set()
        assert self.go.wait(DEADLINE_S)
        return super().acquire(keys, pin=pin, prefix=prefix)


@pytest.fixture
def client() -> Iterator[Client]:
    with lending_client("queue") as client:
        yield client


@pytest.fixture
def pool(client: Client) -> SlowPool:
    pool = SlowPool(client, Counters(), LAYOUT, "model", "shm:0")
    reservation = pool.reserve(KEYS)
    assert reservation is not None and len(reservation.extents) == len(KEYS)
    sizes = [LAYOUT.chunk_bytes] * len(KEYS)
    assert pool.commit(reservation.extents, KEYS, sizes, reservation.lineage)
    return pool


@pytest.fixture
def tier() -> MemoryTier:
    return MemoryTier(1 << 20)


def queue_of(pool: Pool, tier: MemoryTier) -> TierQueue:
    """A queue to this tier."""
    (one,) = LowerTiers([tier], LAYOUT.fingerprint, Counters(), deadline_s=DEADLINE_S).apart()
    return TierQueue(pool, one, 8, Counters())


def pinned(client: Client) -> float:
    """Bytes that somebody pins."""
    return client.stats().counters["pinned_bytes"]


def test_who_stores_does_not_wait_for_the_pin(client: Client, pool: SlowPool, tier: MemoryTier) -> None:
    queue = queue_of(pool, tier)
    queue.accept(KEYS)  # returns although nothing is granted yet
    assert pool.asked.wait(DEADLINE_S)
    assert queue.chunks == len(KEYS) and not queue.flush(0)
    pool.go.set()
    assert queue.flush(DEADLINE_S)
    assert tier.contains(KEYS) == [True] * len(KEYS)
    queue.close()
    assert pinned(client) == 0


def test_what_is_forgotten_before_it_is_pinned_is_not_written(pool: SlowPool, tier: MemoryTier) -> None:
    queue = queue_of(pool, tier)
    queue.accept(KEYS)
    assert pool.asked.wait(DEADLINE_S)
    queue.forget(None)
    pool.go.set()
    assert queue.flush(DEADLINE_S)
    assert len(tier) == 0
    queue.close()


def test_only_what_is_on_its_way_is_remembered_as_forgotten(pool: SlowPool, tier: MemoryTier) -> None:
    queue = queue_of(pool, tier)
    queue.accept(KEYS[:2])
    assert pool.asked.wait(DEADLINE_S)
    queue.forget([KEYS[0], KEYS[2]])  # of which nobody has ever heard of the last
    assert queue._forgotten == {KEYS[0]}
    pool.go.set()
    assert queue.flush(DEADLINE_S)
    assert not queue._forgotten
    assert tier.contains(KEYS) == [False, True, False]
    queue.close()


def test_what_is_pinned_after_the_end_is_given_back(
    client: Client, pool: SlowPool, tier: MemoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcache.engine.tier_queue.TIER_DRAIN_S", 0.0)
    queue = queue_of(pool, tier)
    queue.accept(KEYS)
    assert pool.asked.wait(DEADLINE_S)
    queue.close()
    pool.go.set()
    queue._pinner.shutdown(wait=True)
    assert queue.chunks == 0 and len(tier) == 0
    assert pinned(client) == 0


def test_what_is_dropped_is_told_by_its_cause(pool: SlowPool, tier: MemoryTier) -> None:
    counters = Counters()
    calls = TierCalls(tier, counters, 0.0)
    queue = TierQueue(pool, OneTier(calls, LAYOUT.fingerprint, Lanes(), Passages()), 2, counters)
    queue.accept(KEYS)
    assert counters.snapshot()["failed_tier_queue_full"] == 1
    calls.write(lambda: True)  # whatever it does is late
    failed = counters.snapshot()["failed_tier"]
    queue.accept(KEYS)
    assert counters.snapshot()["failed_tier"] == failed + 1
    assert counters.snapshot()["failed_tier_queue_full"] == 1
    pool.go.set()
    queue.close()


def test_a_queue_that_is_closed_takes_nothing(pool: SlowPool, tier: MemoryTier) -> None:
    queue = queue_of(pool, tier)
    queue.close()
    queue.accept(KEYS)
    assert queue.chunks == 0


def test_who_stores_hears_nothing_of_threads_that_cannot_be_had(
    pool: SlowPool, tier: MemoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = queue_of(pool, tier)

    def submit(task: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(queue._pinner, "submit", submit)
    queue.accept(KEYS)
    assert queue.chunks == 0 and queue._counters.snapshot()["tier_dropped_chunks"] == len(KEYS)
    queue.close()


def test_what_cannot_be_made_leaves_no_thread_behind(
    client: Client, pool: SlowPool, tier: MemoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(room: int) -> Callable[[threading.Thread], None]:
        """`Thread.start` of a process that may have `room` more threads."""
        left = iter(range(room))

        def start(thread: threading.Thread) -> None:
            if next(left, None) is None:
                raise RuntimeError("can't start new thread")
            start_thread(thread)

        return start

    def make_chunks() -> object:
        config = {"layout": LAYOUT, "model": "m", "device": "shm:0", "counters": Counters()}
        return Chunks(client, tiers=[tier], write_back=True, **config)

    def make_work() -> object:
        lower = LowerTiers([tier], LAYOUT.fingerprint, Counters())
        config = load(environ={}, tiers={"policy": "write-back"}).config
        return TierWork(client, pool, lower, Counters(), config=config, chunk_bytes=LAYOUT.chunk_bytes)

    def make_queues() -> object:
        lower = LowerTiers([tier, MemoryTier(64, "second")], LAYOUT.fingerprint, Counters())
        return TierQueues(pool, lower, 8, Counters())

    start_thread = threading.Thread.start
    before = threading.active_count()
    for make in (make_chunks, make_work, make_queues):
        monkeypatch.setattr(threading.Thread, "start", started(1))
        with pytest.raises(RuntimeError, match="new thread"):
            make()
        assert threading.active_count() == before


def test_a_prefetch_without_a_thread_waits_for_nothing(
    pool: SlowPool, tier: MemoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    prefetch = Prefetch(pool, LowerTiers([tier], LAYOUT.fingerprint, Counters()), 64, Counters())
    prefetch.want(KEYS)
    prefetch.wait_for(KEYS[0], DEADLINE_S)
    assert not prefetch.has_brought(KEYS[0], DEADLINE_S)
    prefetch.close()


def test_a_queue_ends_although_its_client_has(client: Client, pool: SlowPool, tier: MemoryTier) -> None:
    queue = queue_of(pool, tier)
    queue.accept(KEYS)
    assert pool.asked.wait(DEADLINE_S)
    client.close()
    pool.go.set()
    queue.close()
    assert queue.chunks == 0 and len(tier) == 0


class SlowTier(MemoryTier):
    """A put of the second key waits for the test: before or after it has kept the chunk."""

    def __init__(self, keeps_first: bool) -> None:
        super().__init__(1 << 20)
        self.keeps_first = keeps_first
        self.putting, self.go = threading.Event(), threading.Event()

    def put(self, key: bytes, chunk: torch.Tensor, layout: bytes, expires_ms: int = 0) -> bool:
        if key != KEYS[1]:
            return super().put(key, chunk, layout, expires_ms)
        kept = self.keeps_first and super().put(key, chunk, layout, expires_ms)
        self.putting.set()
        assert self.go.wait(DEADLINE_S)
        return kept or super().put(key, chunk, layout, expires_ms)


@pytest.fixture
def processes() -> Iterator[Processes]:
    with pool_in_memory() as processes:
        processes.start()
        yield processes


def stored(client: Client) -> Pool:
    """A pool with the three chunks in it."""
    pool = Pool(client, Counters(), LAYOUT, "model", "shm:0")
    reservation = pool.reserve(KEYS)
    assert reservation is not None and len(reservation.extents) == len(KEYS)
    sizes = [LAYOUT.chunk_bytes] * len(KEYS)
    assert pool.commit(reservation.extents, KEYS, sizes, reservation.lineage)
    return pool


def remove(pool: Pool, tier: MemoryTier) -> None:
    """As another process does: the second and the third."""
    assert pool.remove(KEYS[1:]) == 2
    tier.remove(KEYS[1:])


def clear(pool: Pool, tier: MemoryTier) -> None:
    """As another process does."""
    assert pool.clear() == len(KEYS)
    tier.clear()


def test_what_was_removed_during_a_late_write_is_taken_back_although_the_tier_is_left_alone(
    processes: Processes,
) -> None:
    writer, remover = processes.client(lends=1 << 20), processes.client()
    tier, counters = SlowTier(keeps_first=False), Counters()
    (one,) = LowerTiers(
        [tier], LAYOUT.fingerprint, counters, deadline_s=0.0
    ).apart()  # whatever it does is late
    queue = TierQueue(stored(writer), one, 8, Counters())
    queue.accept(KEYS[1:2])
    assert tier.putting.wait(DEADLINE_S)
    remove(Pool(remover, Counters(), LAYOUT, "model", "shm:0"), tier)
    tier.go.set()
    assert queue.flush(DEADLINE_S)
    assert not one.is_available
    eventually(lambda: tier.contains(KEYS[1:2]) == [False], "it was taken back")
    queue.close()


@pytest.mark.parametrize("keeps_first", [False, True], ids=["before its write", "after its write"])
@pytest.mark.parametrize("forget", [remove, clear])
def test_what_another_process_removes_while_it_is_written_does_not_come_back(
    processes: Processes, forget: Callable[[Pool, MemoryTier], None], keeps_first: bool
) -> None:
    writer, remover = processes.client(lends=1 << 20), processes.client()
    tier = SlowTier(keeps_first)
    queue = queue_of(stored(writer), tier)
    queue.accept(KEYS)
    assert tier.putting.wait(DEADLINE_S)  # the third waits behind it
    forget(Pool(remover, Counters(), LAYOUT, "model", "shm:0"), tier)
    tier.go.set()
    assert queue.flush(DEADLINE_S)
    assert tier.contains(KEYS) == [forget is remove, False, False]
    queue.close()
    assert pinned(remover) == 0
    remover.check()


def test_what_is_accepted_while_the_pool_is_being_cleared_does_not_come_back(processes: Processes) -> None:
    tier = SlowTier(keeps_first=False)
    pool = stored(processes.client(lends=1 << 20))
    queue = queue_of(pool, tier)
    queue.forget(None)
    queue.accept(KEYS)
    assert tier.putting.wait(DEADLINE_S)
    clear(pool, tier)
    tier.go.set()
    assert queue.flush(DEADLINE_S)
    assert len(tier) == 0
    queue.close()


def test_what_is_evicted_after_it_was_written_stays_below(processes: Processes) -> None:
    client, tier = processes.client(lends=1 << 20), MemoryTier(1 << 20)
    pool = stored(client)
    queue = queue_of(pool, tier)
    queue.accept(KEYS)
    assert queue.flush(DEADLINE_S)
    others = [bytes([number]) * 32 for number in range(3, 250)]
    reservation = pool.reserve(others)
    assert reservation is not None
    assert pool.contains(KEYS) == [False] * len(KEYS)
    assert tier.contains(KEYS) == [True] * len(KEYS)
    queue.close()


def test_what_is_pinned_to_be_written_is_not_evicted(processes: Processes) -> None:
    client, tier = processes.client(lends=1 << 20), SlowTier(keeps_first=True)
    pool = stored(client)
    queue = queue_of(pool, tier)
    queue.accept(KEYS)
    assert tier.putting.wait(DEADLINE_S)
    reservation = pool.reserve([bytes([number]) * 32 for number in range(3, 250)])
    assert reservation is not None
    assert pool.contains(KEYS) == [True] * len(KEYS)
    tier.go.set()
    assert queue.flush(DEADLINE_S)
    assert tier.contains(KEYS) == [True] * len(KEYS)
    queue.close()


def test_a_server_that_does_not_answer_has_removed_nothing(processes: Processes) -> None:
    client, tier = processes.client(lends=1 << 20), SlowTier(keeps_first=True)
    pool = stored(client)
    queue = queue_of(pool, tier)
    queue.accept(KEYS)
    assert tier.putting.wait(DEADLINE_S)
    processes.kill()
    assert pool.contains(KEYS) == [False] * len(KEYS)
    tier.go.set()
    assert queue.flush(DEADLINE_S)
    assert tier.contains(KEYS) == [True] * len(KEYS)
    queue.close()
