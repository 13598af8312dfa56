"""Requests and answers are lost, repeated and late: what is served is right, what was granted unheard comes
back, and a request that is sent again is carried out once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes.content import LAYOUT
from tests.processes.pool import Pool, lent_on
from tests.processes.worker import Worker, eventually
from tests.support.lossy import Fate, LossyRelay, first_answers

CHUNK = LAYOUT.chunk_tokens
SIZE = "2MiB"

HASTY = {"client.request_timeout_ms": 200}
"""So that many requests are given up, and their answers come to nobody."""

PATIENT = {"client.request_timeout_ms": 800}
"""Sent again every 200 ms."""

BAD = Fate(lost=0.15, repeated=0.2, delayed=0.2, delay_s=0.4)


@pytest.fixture
def pool() -> Iterator[Pool]:
    """A pool with a server and a holder, which nothing disturbs."""
    with Pool(lease_ms=300) as pool:
        pool.start_server()
        pool.start_holder("shm:0", SIZE)
        yield pool


@pytest.fixture
def front(pool: Pool) -> Path:
    """The runtime directory of those whose frames get lost."""
    return pool.path.parent / "front"


def engines_and_pins(child: Any, seed: int, rounds: int) -> tuple[int, int, int]:
    """Store and retrieve by the engine, pin and write by a bare client: (tokens hit, wrong ones, chunks
    pinned).
    """
    from tests import client_pool
    from vcache.errors import ServerError, Unavailable

    rng = random.Random(seed)
    hit = wrong = pinned = 0
    for _ in range(rounds):
        number, count = rng.randrange(50), rng.randint(1, 8) * CHUNK
        chunks = [number, number + 1]
        try:
            match rng.randrange(4):
                case 0:
                    child.store(number, count)
                case 1:
                    found, bad = child.retrieve(number, count)
                    hit, wrong = hit + found, wrong + bad
                case 2:
                    client_pool.store(child.client, chunks)
                case 3:
                    pinned += client_pool.read(child.client, chunks, pin=True)
        except (Unavailable, ServerError):  # the bare client's; an engine's are misses
            child.engine.wait_connected(1.0)
    return hit, wrong, pinned


def connected(child: Any) -> bool:
    """Wait until the engine is served; whether it is."""
    return bool(child.engine.wait_connected(60.0))


def open_behind(pool: Pool, front: Path, *, size: int | str = 0, **config: Any) -> Worker:
    """A worker with an engine whose frames go through the relay."""
    worker = pool.start_worker()
    given = {**pool.client_config(), **config, "runtime_dir": str(front)}
    worker.call("open_engine", **given, **lent_on("shm:1", size))
    assert worker.call("open_client", **given)
    return worker


@pytest.mark.parametrize("seed", [1, 2])
def test_lost_repeated_and_late_frames(pool: Pool, front: Path, seed: int) -> None:
    with LossyRelay(pool.path, front, seed=seed) as relay:
        workers = [open_behind(pool, front, size=size, **HASTY) for size in ("1MiB", 0)]
        relay.fate = BAD
        hit = pinned = batch = 0
        while batch == 0 or not (hit and pinned):  # a busy machine can keep every answer for 200 ms
            assert batch < 10
            for number, worker in enumerate(workers):
                worker.send("run", engines_and_pins, 100 * batch + 10 * seed + number, 70)
            for worker in workers:
                found, wrong, held = worker.result()
                assert not wrong
                hit, pinned = hit + found, pinned + held
            batch += 1
        for kind in ("requests", "answers"):
            for fate in ("lost", "repeated", "delayed"):
                assert relay.counts[f"{kind} {fate}"] > 0
        pool.assert_nothing_leaks()
        for worker in workers:
            worker.call("close")
    eventually(lambda: len(pool.statistics().sessions) == 2, "the sessions ended")
    pool.assert_nothing_leaks()


def test_requests_whose_first_answers_are_lost_are_carried_out_once(pool: Pool, front: Path) -> None:
    with LossyRelay(pool.path, front) as relay:
        engine = open_behind(pool, front, **PATIENT)
        relay.drop_answer = first_answers()
        for seed in range(3):
            engine.call("store", seed, 5 * CHUNK)
            assert engine.call("retrieve", seed, 5 * CHUNK) == (5 * CHUNK, 0)
        assert relay.counts["answers lost"] >= 9
        counters, stats = pool.counters(), engine.call("stats")
        assert counters["committed"] == counters["reserved"] == stats["stored_chunks"] == 15
        assert counters["hit_chunks"] == stats["hits"] == 15
        assert not counters.get("reclaimed")
        assert not any(stats[name] for name in stats if name.startswith("failed_"))
        pool.assert_nothing_leaks()


def test_every_frame_twice_is_as_good_as_once(pool: Pool, front: Path) -> None:
    with LossyRelay(pool.path, front, Fate(repeated=1.0)) as relay:
        engines = [open_behind(pool, front, **PATIENT) for _ in range(2)]
        for seed in range(10):
            engines[seed % 2].call("store", seed, 5 * CHUNK)
            assert engines[1 - seed % 2].call("retrieve", seed, 5 * CHUNK) == (5 * CHUNK, 0)
        assert relay.counts["requests repeated"] == relay.counts["requests"] > 40
        counters = pool.counters()
        assert counters["committed"] == counters["reserved"] == counters["hit_chunks"] == 50
        for engine in engines:
            stats = engine.call("stats")
            assert not any(stats[name] for name in stats if name.startswith("failed_"))
        pool.assert_nothing_leaks()


def test_answers_that_come_too_late_are_misses_and_leak_nothing(pool: Pool, front: Path) -> None:
    with LossyRelay(pool.path, front) as relay:
        engine = open_behind(pool, front, **HASTY)
        engine.call("store", 1, 5 * CHUNK)
        relay.fate = Fate(delayed=1.0, delay_s=0.6)
        for seed in range(1, 6):
            assert engine.call("run", connected)
            hit, wrong = engine.call("retrieve", 1, 5 * CHUNK)
            assert hit in (0, 5 * CHUNK)
            assert wrong == 0
            engine.call("store", seed, 5 * CHUNK)
        assert engine.call("stats")["failed_no_server"] > 2
        relay.fate = Fate()
        eventually(lambda: engine.call("retrieve", 1, 5 * CHUNK) == (5 * CHUNK, 0), "all is well again")
        pool.assert_nothing_leaks()


def test_server_killed_while_frames_get_lost(pool: Pool, front: Path) -> None:
    """Late frames of before reach the next server, which refuses them."""
    with LossyRelay(pool.path, front, seed=3) as relay:
        workers = [open_behind(pool, front, size=size, **HASTY) for size in ("1MiB", 0)]
        relay.fate = BAD
        for number, worker in enumerate(workers):
            worker.send("run", engines_and_pins, number, 90)
        for _ in range(3):
            began = pool.counters().get("requests", 0)
            pool.eventually(lambda pool, began=began: pool.counters()["requests"] > began + 100, "they go on")  # type: ignore[misc]
            pool.kill_server()
            pool.start_server()
        results = [worker.result() for worker in workers]
        assert not sum(wrong for _, wrong, _ in results)
        pool.assert_nothing_leaks()
        for worker in workers:
            assert not worker.call("stats").get("client_cold_starts")
            worker.call("close")
    pool.assert_nothing_leaks()
