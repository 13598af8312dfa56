"""Prompts that the pool lost come from the local tier: evicted, after the engine, after everything has
ended; and what kill -9 leaves of a database.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.client_pool import alive
from tests.processes.content import LAYOUT
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S, Worker, eventually
from vcache.limits import MIB
from vcache.tiers.record import Header
from vcache.tiers.rocksdb import files
from vcache.tiers.rocksdb.database import Database, Draft
from vcache.tiers.rocksdb.tier import RocksTier

CHUNK = LAYOUT.chunk_tokens
PROMPT = 20 * CHUNK
SMALL = 4096 + 8 * 8192
"""A segment with room for eight chunks."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A directory for the tier; its owner ends with the test."""
    path = tmp_path / "tier"
    yield path
    tier = RocksTier(path, capacity_bytes=MIB, observes=True)
    pid = tier.state().pid
    tier.close()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not alive(pid), "the owner ends")


def engine(pool: Pool, folder: Path, **given: Any) -> Worker:
    """An engine with the local tier, from its configuration alone."""
    tier = {"tiers.order": "rocksdb", "tiers.rocksdb.directory": str(folder), "tiers.rocksdb.size": "64MiB"}
    return pool.engine(**{**tier, "tiers.deadline_ms": 60_000, "size": SMALL, **given})


def flush(child: Any) -> bool:
    """In a worker: have everything written below, and on the disk."""
    assert child.engine.flush_tiers(DEADLINE_S)
    return bool(child.engine._own_tiers[0].sync())


def test_what_the_pool_evicted_comes_from_the_disk(folder: Path) -> None:
    with Pool() as pool:
        pool.start_server()
        worker = engine(pool, folder)
        worker.call("store", 1, PROMPT)  # twenty chunks through room for eight
        assert worker.call("run", flush)
        for seed in range(2, 6):
            worker.call("store", seed, 4 * CHUNK)
            assert worker.call("run", flush)
        assert worker.call("lookup", 2, 4 * CHUNK) == 4 * CHUNK
        assert worker.call("retrieve", 2, 4 * CHUNK) == (4 * CHUNK, 0)
        stats = worker.call("stats")
        assert stats["tier_prefetched_chunks"] + stats["tier_promoted_chunks"] == 4
        pool.assert_nothing_leaks()


def test_a_prompt_survives_the_engine_and_then_everything(folder: Path) -> None:
    """Another engine hits; then, as after a reboot, another server in another runtime directory."""
    with Pool() as pool:
        pool.start_server()
        first = engine(pool, folder, size="2MiB")
        first.call("store", 1, PROMPT)
        assert first.call("run", flush)
        first.kill()
        assert engine(pool, folder).call("retrieve", 1, PROMPT) == (PROMPT, 0)
    tier = RocksTier(folder, capacity_bytes=MIB, observes=True)
    owner = tier.state().pid
    tier.close()
    os.kill(owner, signal.SIGKILL)
    eventually(lambda: not alive(owner), "the owner ends")
    with Pool() as pool:
        pool.start_server()
        fresh = engine(pool, folder)
        assert fresh.call("lookup", 1, PROMPT) == PROMPT
        assert fresh.call("retrieve", 1, PROMPT) == (PROMPT, 0)
        pool.assert_nothing_leaks()


def test_two_engines_at_once(folder: Path) -> None:
    with Pool() as pool:
        pool.start_server()
        one, two = engine(pool, folder), engine(pool, folder, device="shm:1")
        one.send("store", 1, PROMPT)
        two.send("store", 2, PROMPT)
        one.result()
        two.result()
        assert one.call("run", flush) and two.call("run", flush)
        kept = [tuple(worker.call("retrieve", seed, PROMPT)) for worker in (one, two) for seed in (1, 2)]
        assert all(wrong == 0 for _, wrong in kept)
        pool.assert_nothing_leaks()


def wait_long(child: Any) -> None:
    """In a worker: stores wait for what is being copied as long as it takes."""
    from vcache.engine import pool

    pool.SAVE_WAIT_S = DEADLINE_S  # type: ignore[misc]


def records(child: Any) -> int:
    """In a worker: chunks in the tier."""
    return int(child.engine._own_tiers[0].state().records)


def test_write_back_writes_what_the_pool_evicts_and_nothing_else(folder: Path) -> None:
    with Pool() as pool:
        pool.start_server()
        pool.start_holder("shm:0", "2MiB")
        worker = engine(pool, folder, size=0, **{"tiers.policy": "write-back"})
        worker.call("run", wait_long)
        for seed in range(1, 11):
            worker.call("store", seed, PROMPT)
        assert worker.call("run", records) == 0, "the pool has room for all of it"
        for seed in range(11, 21):
            worker.call("store", seed, PROMPT)
        assert 0 < worker.call("run", records) < 20 * 20, "only what had to go"
        hits = [tuple(worker.call("retrieve", seed, PROMPT)) for seed in range(1, 21)]
        assert hits == [(PROMPT, 0)] * 20 or pool.counters()["evicted_unsaved"] > 0
        # Another engine finds below what this one wrote, and in the pool what only the pool had.
        worker.kill()
        other = engine(pool, folder, size=0)
        assert tuple(other.call("retrieve", 1, PROMPT)) == (PROMPT, 0) or pool.counters()["evicted_unsaved"]
        pool.assert_nothing_leaks()


def test_write_back_and_remove(folder: Path) -> None:
    """What is removed while it is on its way down is not below in the end."""
    with Pool() as pool:
        pool.start_server()
        worker = engine(pool, folder, size="2MiB", **{"tiers.policy": "write-back"})
        for seed in range(1, 21):
            worker.call("store", seed, PROMPT)
            assert worker.call("run", forget, seed, PROMPT)[1] == 0
        assert worker.call("run", flush)
        for seed in range(1, 21):
            assert worker.call("lookup", seed, PROMPT) == 0
        pool.assert_nothing_leaks()


def store_many(child: Any, first: int, count: int) -> None:
    """In a worker."""
    for seed in range(first, first + count):
        child.store(seed, PROMPT)


def test_an_engine_is_killed_while_it_writes_back(folder: Path) -> None:
    """Its copies end with it; another engine goes on, and what is there is right."""
    with Pool() as pool:
        pool.start_server()
        pool.start_holder("shm:0", "512KiB")
        other = engine(pool, folder, size=0, **{"tiers.policy": "write-back"})
        for first in (1, 101, 201):
            victim = engine(pool, folder, size=0, **{"tiers.policy": "write-back"})
            done = pool.counters().get("copies_done", 0)
            victim.send("run", store_many, first, 100)
            pool.eventually(lambda pool, done=done: pool.counters().get("copies_done", 0) > done, "copies")
            victim.kill()
            pool.assert_nothing_leaks()
        other.call("run", store_many, 301, 10)
        hits = [tuple(other.call("retrieve", seed, PROMPT)) for seed in (1, 2, 101, 102, 301, 310)]
        assert all(wrong == 0 for _, wrong in hits)
        pool.assert_nothing_leaks()


def forget(child: Any, seed: int, count: int) -> tuple[int, int]:
    """In a worker: remove a prompt's chunks everywhere; (how many the pool had, tokens found then)."""
    from tests.processes.content import prompt
    from vcache.keys import KeyChain

    keys = KeyChain(LAYOUT.fingerprint, "test-model").keys(prompt(seed, count), CHUNK)
    return child.engine.remove(keys), child.engine.lookup(prompt(seed, count))


def clear(child: Any) -> int:
    """In a worker."""
    return int(child.engine.clear())


def test_remove_and_clear_reach_the_tier(folder: Path) -> None:
    with Pool() as pool:
        pool.start_server()
        worker = engine(pool, folder, size="2MiB")
        worker.call("store", 1, PROMPT)
        worker.call("store", 2, PROMPT)
        assert worker.call("run", forget, 1, PROMPT) == (20, 0)
        assert worker.call("run", flush)
        assert worker.call("lookup", 1, PROMPT) == 0, "what was on its way came back"
        assert worker.call("run", clear) == 20
        assert worker.call("lookup", 2, PROMPT) == 0
        pool.assert_nothing_leaks()


# ------------------------------------------------------------------------------------------ kill -9

KILLS = 100
RECORDS = 12
SIZE = 96 << 10


def content(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def write_until_killed(path: Path, first: int, pipe: Connection) -> None:
    """In a child: put records, sync now and then; say each number before it is put, and after it."""
    clock_s = float(first)  # later than in any child before: the least recently used go first

    def clock() -> float:
        return clock_s

    database = Database(path, 24 * MIB, 0.0, clock)
    for number in range(first, first + RECORDS):
        clock_s += 0.4  # so that flushes come due
        chunk = content(number)
        pipe.send(("put", number))
        draft = database.begin(key(number), SIZE)
        assert isinstance(draft, Draft)
        header = Header(b"L" * 16, key(number), SIZE, number, 0, 0)
        files.write(draft.path, header, memoryview(chunk))
        assert database.commit(draft)
        pipe.send(("kept", number))
        database.tick()
        if number % 5 == 4:
            assert database.sync()
    pipe.send(("end", 0))
    pipe.recv()


@pytest.mark.timeout(600)  # twenty seconds on a machine with nothing else to do
def test_kill_9_in_mid_write_a_hundred_times(tmp_path: Path) -> None:
    """No wrong bytes ever, and no record lost that was kept, unless it had to go for room."""
    multiprocessing.set_forkserver_preload(["tests.processes.test_tier_rocksdb"])
    context = multiprocessing.get_context("forkserver")
    rng = random.Random(1)
    certain: set[int] = set()
    for kill in range(KILLS):
        ours, theirs = context.Pipe()
        first = kill * RECORDS
        child = context.Process(target=write_until_killed, args=(tmp_path, first, theirs), daemon=True)
        child.start()
        theirs.close()
        until = rng.randrange(first, first + RECORDS)
        while ours.poll(DEADLINE_S):
            what, number = ours.recv()
            if what == "kept":
                certain.add(number)
            if what == "end" or (what == "put" and number >= until):
                break
        child.kill()
        child.join(DEADLINE_S)
        ours.close()
        if kill % 10 == 9:
            verify(tmp_path, first + RECORDS, certain)
    assert len(certain) > KILLS


def verify(path: Path, end: int, certain: set[int]) -> None:
    database = Database(path, 24 * MIB, 0.0, lambda: 0.0)
    try:
        here = set()
        into = bytearray(SIZE)
        for number in range(max(0, end - 20 * RECORDS), end):
            read = files.read(files.path_of(path, key(number)), key(number), b"L" * 16, memoryview(into))
            if read is not None:
                assert isinstance(read, Header), read
                assert into == content(number)
                assert database.contains(key(number))
                here.add(number)
        recent = {number for number in certain if number >= end - 15 * RECORDS}  # far from going for room
        assert recent <= here, sorted(recent - here)
    finally:
        database.close()
