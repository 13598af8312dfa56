"""Holders that are killed, stopped or ended while engines read and write their memory, and engines that die
while the holder of their KV lives.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.processes.content import LAYOUT
from tests.processes.devices import GPUS
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S, Worker, all_stopped, eventually

CHUNK = LAYOUT.chunk_tokens
PROMPT = 40 * CHUNK
SIZE = "2MiB"
CHUNKS_OF_SIZE = 255
"""What a segment of that size has room for."""
LET_GO_S = 1.0
"""Importers unmap within this time of the notice, also when idle (the design's rule 4)."""


@pytest.fixture
def pool() -> Iterator[Pool]:
    """A server. Whatever the test did: in the end nothing leaks."""
    with Pool() as pool:
        pool.start_server()
        yield pool
        pool.assert_nothing_leaks()


def segments(pool: Pool) -> set[int]:
    """The segments of the pool."""
    return {row.segment for row in pool.statistics().segments}


def assert_lets_go(worker: Worker, device: str) -> None:
    """Soon neither mapping nor descriptor of a segment of this device is left in the process."""
    eventually(lambda: not worker.has_memory_of(device), f"worker {worker.pid} unmaps {device}", LET_GO_S)


def reader_of(pool: Pool, seed: int) -> Worker:
    """An engine that has read a prompt, and so mapped shm:0, and does nothing now."""
    reader = pool.engine(device="shm:1")
    assert reader.call("retrieve", seed, PROMPT) == (PROMPT, 0)
    assert reader.has_memory_of("shm:0")
    return reader


# ------------------------------------------------------------------------------------------ holders


def read_until_missed(child: Any, seed: int) -> Counter[str]:
    """In a worker: retrieve a prompt again and again until it is a miss."""
    seen: Counter[str] = Counter()
    hit = PROMPT
    until_s = time.monotonic() + DEADLINE_S
    while hit and time.monotonic() < until_s:
        hit, wrong = child.retrieve(seed, PROMPT)
        seen.update(calls=1, hit=hit, wrong=wrong)
    return seen


def test_a_holder_killed_while_engines_read(pool: Pool) -> None:
    """From then on misses; the memory goes from every engine, from one that is idle too."""
    holder, number = pool.start_holder("shm:0", SIZE)
    writer = pool.engine(device="shm:0")
    writer.call("store", 1, PROMPT)
    idle, busy = reader_of(pool, 1), reader_of(pool, 1)
    other, kept = pool.start_holder("shm:2", SIZE)
    busy.send("run", read_until_missed, 1)
    eventually(lambda: pool.counters()["hit_chunks"] > 100, "the reader is in full swing")
    holder.kill()
    holder.wait(DEADLINE_S)
    for each in (idle, writer):
        assert_lets_go(each, "shm:0")
    seen = busy.result()
    assert seen["wrong"] == 0
    assert seen["hit"] == (seen["calls"] - 1) * PROMPT, "nothing but whole hits, then a miss"
    assert_lets_go(busy, "shm:0")
    assert segments(pool) == {kept} != {number}
    for each in (idle, writer):
        assert each.call("lookup", 1, PROMPT) == 0
        assert each.call("retrieve", 1, PROMPT) == (0, 0)
    writer.call("store", 1, PROMPT)
    assert idle.call("retrieve", 1, PROMPT) == (PROMPT, 0), "the other holder's segment takes its place"
    assert other.poll() is None


ENDS = pytest.mark.parametrize(
    ("where", "end"),
    [
        ("before", signal.SIGKILL),
        ("amid", signal.SIGKILL),
        ("after", signal.SIGKILL),
        ("amid", signal.SIGTERM),  # it waits for its importers, but not for one that sleeps
    ],
)


@ENDS
def test_a_holder_that_ends_in_the_midst_of_a_copy(pool: Pool, where: str, end: int) -> None:
    """A reader that is stopped in its copy has the memory until it is over, and counts a miss."""
    holder, _ = pool.start_holder("shm:0", SIZE)
    pool.engine(device="shm:0").call("store", 1, PROMPT)
    reader = reader_of(pool, 1)
    reader.call("stop_at", "scatter", where)
    reader.send("retrieve", 1, PROMPT)
    reader.wait_stopped()
    holder.send_signal(end)
    holder.wait(DEADLINE_S)
    pool.eventually(lambda pool: not segments(pool), "the segment ends")
    if not GPUS:  # of a GPU's memory only the reader itself could say, and it sleeps
        assert reader.has_memory_of("shm:0")
    reader.wake()
    assert reader.result() == (0, 0)
    assert reader.call("stats")["failed_fence_broken"] == 1
    assert_lets_go(reader, "shm:0")


@ENDS
def test_a_holder_that_ends_in_the_midst_of_a_store(pool: Pool, where: str, end: int) -> None:
    """What a stopped writer writes goes nowhere, and it is told so when it commits."""
    holder, _ = pool.start_holder("shm:0", SIZE)
    writer = pool.engine(device="shm:0")
    writer.call("store", 1, PROMPT)
    writer.call("stop_at", "gather", where)
    writer.send("store", 2, PROMPT)
    writer.wait_stopped()
    holder.send_signal(end)
    holder.wait(DEADLINE_S)
    pool.eventually(lambda pool: not segments(pool), "the segment ends")
    new, _ = pool.start_holder("shm:0", SIZE)
    writer.wake()
    writer.result()
    stats = writer.call("stats")
    assert (stats["stored_chunks"], stats["unstored_chunks"], stats["failed_stale"]) == (40, 40, 1)
    assert writer.call("lookup", 2, PROMPT) == 0
    pool.assert_nothing_leaks()
    writer.call("store", 2, PROMPT)
    assert pool.engine(device="shm:1").call("retrieve", 2, PROMPT) == (PROMPT, 0)
    assert new.poll() is None


def test_a_holder_ended_in_order(pool: Pool) -> None:
    """It exits with 0 when everybody has let go of its memory; then misses, and stores that go elsewhere."""
    holder, _ = pool.start_holder("shm:0", SIZE)
    writer = pool.engine(device="shm:0")
    writer.call("store", 1, PROMPT)
    readers = [reader_of(pool, 1), reader_of(pool, 1)]
    _, kept = pool.start_holder("shm:2", SIZE)
    holder.send_signal(signal.SIGTERM)
    assert holder.wait(DEADLINE_S) == 0
    for each in (writer, *readers):
        assert not each.has_memory_of("shm:0"), "the holder did not wait for its importers"
    assert segments(pool) == {kept}
    assert readers[0].call("retrieve", 1, PROMPT) == (0, 0)
    writer.call("store", 1, PROMPT)
    assert readers[1].call("retrieve", 1, PROMPT) == (PROMPT, 0)


def test_a_stopped_holder_is_no_hindrance(pool: Pool) -> None:
    """Its memory is there, and nobody needs its help to read and write it; killed in its sleep it is gone."""
    holder, number = pool.start_holder("shm:0", SIZE)
    writer = pool.engine(device="shm:0")
    writer.call("store", 1, PROMPT)
    holder.send_signal(signal.SIGSTOP)
    eventually(lambda: all_stopped(holder.pid), "the holder stops")
    readers = [reader_of(pool, 1), pool.engine(device="shm:1")]  # the second one maps it now
    writer.call("store", 2, PROMPT)
    assert all(reader.call("retrieve", 2, PROMPT) == (PROMPT, 0) for reader in readers)
    assert segments(pool) == {number}
    holder.kill()
    holder.wait(DEADLINE_S)
    for each in (writer, *readers):
        assert_lets_go(each, "shm:0")
    assert readers[0].call("retrieve", 2, PROMPT) == (0, 0)


def test_a_holder_that_comes_back_begins_empty(pool: Pool) -> None:
    """Another process is another incarnation, under another number: nothing of before is found in it."""
    holder, first = pool.start_holder("shm:0", SIZE)
    writer = pool.engine(device="shm:0")
    for _ in range(3):
        writer.call("store", 1, PROMPT)
        reader = reader_of(pool, 1)
        holder.kill()
        holder.wait(DEADLINE_S)
        pool.eventually(lambda pool: not segments(pool), "the segment ends")
        holder, second = pool.start_holder("shm:0", SIZE)
        assert second > first
        first = second
        assert reader.call("retrieve", 1, PROMPT) == (0, 0)
    writer.call("store", 1, PROMPT)
    assert writer.call("retrieve", 1, PROMPT) == (PROMPT, 0)


# ------------------------------------------------------------------------------------------ engines


def test_the_pool_outlives_an_engine_whose_holder_lives(pool: Pool) -> None:
    """Others hit what a killed engine stored, and so does its successor; also if it died in a store."""
    pool.start_holder("shm:0", SIZE)
    engine, reader = pool.engine(device="shm:0"), pool.engine(device="shm:1")
    engine.call("store", 1, PROMPT)
    engine.call("stop_at", "gather", "amid")
    engine.send("store", 2, PROMPT)
    engine.wait_stopped()
    engine.kill()
    pool.eventually(lambda pool: not pool.counters()["reservations"], "the reservation ends")
    successor = pool.engine(device="shm:0")
    for each in (reader, successor):
        assert each.call("lookup", 1, PROMPT) == each.call("lookup", 1, PROMPT + CHUNK) == PROMPT
        assert each.call("retrieve", 1, PROMPT) == (PROMPT, 0)
        assert each.call("retrieve", 2, PROMPT) == (0, 0)
    successor.call("store", 2, PROMPT)
    assert reader.call("retrieve", 2, PROMPT) == (PROMPT, 0)


def test_an_engine_that_held_its_own_segment_takes_it_along(pool: Pool) -> None:
    """Killed or closed: its chunks are misses, what it stored in its peer's segment stays."""
    peer = pool.engine(device="shm:1", size=SIZE)
    for end in (Worker.kill, Worker.end):
        engine = pool.engine(device="shm:0", size=SIZE)
        engine.call("store", 1, (CHUNKS_OF_SIZE + 4) * CHUNK)
        assert peer.call("retrieve", 1, (CHUNKS_OF_SIZE + 4) * CHUNK) == ((CHUNKS_OF_SIZE + 4) * CHUNK, 0)
        assert peer.has_memory_of("shm:0")
        end(engine)
        assert_lets_go(peer, "shm:0")
        assert peer.call("retrieve", 1, (CHUNKS_OF_SIZE + 4) * CHUNK) == (0, 0)
        rows = pool.statistics().segments
        assert [row.committed_bytes for row in rows] == [4 * 8192]
        assert pool.observer.clear() == 4


def test_engines_and_holders_that_die_at_once(pool: Pool) -> None:
    """A holder and the engines that write and read it, killed in one go, several times over."""
    for seed in range(3):
        holder, _ = pool.start_holder("shm:0", SIZE)
        engines = [pool.engine(device="shm:0") for _ in range(2)]
        engines[0].call("store", seed, PROMPT)
        engines[1].send("run", read_until_missed, seed)
        engines[0].send("store", seed + 100, 200 * CHUNK)
        for pid in (holder.pid, *(engine.pid for engine in engines)):
            os.kill(pid, signal.SIGKILL)
        holder.wait(DEADLINE_S)
        pool.eventually(lambda pool: not segments(pool), "the segment ends")
        pool.assert_nothing_leaks()
        assert pool.counters()["chunks"] == 0
