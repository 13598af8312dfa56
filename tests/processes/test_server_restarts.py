"""The server is killed, stopped, or loses its table in the middle of traffic: every byte that is served is
right, the pool stays warm wherever it can, and in the end nothing has leaked.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import client_pool
from tests.processes.content import LAYOUT
from tests.processes.devices import device_of, size_on
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S, Worker, eventually
from vcache.client import Client
from vcache.config import load, parse_size
from vcache.limits import MIB
from vcache.segment import allocate
from vcache.table import RECORD

CHUNK = LAYOUT.chunk_tokens
SIZE = "2MiB"
"""A segment for 255 chunks."""

IMPATIENT: dict[str, Any] = {"client.request_timeout_ms": 300}

PATIENT: dict[str, Any] = {"client.request_timeout_ms": 60_000}


@pytest.fixture
def pool() -> Iterator[Pool]:
    """A pool with a server whose leases are short, so that what leaks is seen soon."""
    with Pool(lease_ms=500) as pool:
        pool.start_server()
        yield pool


@contextmanager
def client(pool: Pool, lends: int = 0, **config: Any) -> Iterator[Client]:
    """A bare client of this process; lends: bytes of its segment on shm:9."""
    device = device_of("shm:9")
    new_segment = (lambda: allocate(device, parse_size(size_on(device, lends)))) if lends else None
    client = Client(load(**{**pool.client_config(), **config}).config, name="bare", new_segment=new_segment)
    try:
        assert client.wait_connected(DEADLINE_S)
        yield client
    finally:
        client.close()


def traffic(child: Any, seed: int, prompts: int, until: str) -> tuple[int, int, int, float]:
    """Store and retrieve prompts at random until a file is there.

    (rounds, tokens hit, tokens hit with wrong bytes, seconds that the longest call took)
    """
    rng = random.Random(seed)
    rounds = hit = wrong = 0
    longest_s = 0.0
    while not Path(until).exists():
        number, count = rng.randrange(prompts), rng.randint(1, 8) * CHUNK
        began_s = time.monotonic()
        if rng.random() < 0.5:
            child.store(number, count)
        else:
            found, bad = child.retrieve(number, count)
            hit, wrong = hit + found, wrong + bad
        longest_s = max(longest_s, time.monotonic() - began_s)
        rounds += 1
    return rounds, hit, wrong, longest_s


class Traffic:
    """Engines that store and retrieve the same prompts all the time: more than fit, so some are evicted."""

    def __init__(self, pool: Pool, workers: list[Worker], prompts: int = 150) -> None:
        self._pool = pool
        self._workers = workers
        self._end = pool.path.parent / "end"
        for seed, worker in enumerate(workers):
            worker.send("run", traffic, seed, prompts, str(self._end))

    def wait_served(self) -> None:
        """Wait until the server of now has all sessions, and from now on has stored for them and had hits."""
        began = self._pool.counters()

        def served(pool: Pool) -> bool:
            counters = pool.counters()
            grown = [counters.get(name, 0) - began.get(name, 0) for name in ("committed", "hit_chunks")]
            return min(grown) > 20 and all(row.here for row in pool.statistics().sessions)

        self._pool.eventually(served, "the traffic goes on")

    def end(self) -> None:
        """End it; all that was served was right, and nobody waited for longer than a few timeouts."""
        self._end.touch()
        for worker in self._workers:
            rounds, hit, wrong, longest_s = worker.result()
            assert wrong == 0
            assert hit > 0
            assert rounds > 10
            assert longest_s < 5.0, "every request has a deadline"


def test_server_killed_many_times_in_the_middle_of_traffic(pool: Pool) -> None:
    _, holder = pool.start_holder("shm:0", SIZE)
    workers = [
        pool.engine(device=f"shm:{number}", size=size, **IMPATIENT)
        for number, size in ((1, "1MiB"), (2, "1MiB"), (3, "0"))
    ]
    flow = Traffic(pool, workers)
    for _ in range(5):
        flow.wait_served()
        pool.kill_server()
        pool.start_server()
    flow.wait_served()
    flow.end()
    pool.assert_nothing_leaks()
    assert len(pool.statistics().segments) == 3
    assert holder in {row.segment for row in pool.statistics().segments}
    for worker in workers:
        stats = worker.call("stats")
        assert not stats.get("client_cold_starts")
        assert stats["client_reserved"] == stats["client_pinned"] == 0


def test_pool_stays_warm_over_many_restarts(pool: Pool) -> None:
    pool.start_holder("shm:0", SIZE)
    writer, reader = pool.engine(size="1MiB"), pool.engine()
    for seed in range(20):
        writer.call("store", seed, 8 * CHUNK)
    for _ in range(4):
        pool.kill_server()
        pool.start_server()
        assert pool.counters()["chunks"] == 160
        for seed in range(20):
            found = [reader.call("retrieve", seed, 8 * CHUNK)]
            eventually(
                lambda seed=seed, found=found: (
                    found[-1] == (8 * CHUNK, 0)  # type: ignore[misc]
                    or found.append(reader.call("retrieve", seed, 8 * CHUNK))
                ),
                "the reader is back",
            )
            assert not any(wrong for _, wrong in found)
    pool.assert_nothing_leaks()


def test_server_killed_right_after_it_came_back_again_and_again(pool: Pool) -> None:
    """It is killed anywhere in its start: reading the table, waiting for sessions, taking up segments."""
    pool.start_holder("shm:0", SIZE)
    worker = pool.engine(**IMPATIENT)
    worker.call("store", 1, 8 * CHUNK)
    flow = Traffic(pool, [worker])
    rng = random.Random(3)
    for _ in range(6):
        pool.kill_server()
        successor = pool.launch_server()
        with pytest.raises(subprocess.TimeoutExpired):
            successor.wait(rng.uniform(0.1, 0.5))
    pool.kill_server()
    pool.start_server()
    flow.wait_served()
    flow.end()
    pool.assert_nothing_leaks()


def connected(child: Any) -> bool:
    """Wait until the engine is served; whether it is."""
    return bool(child.engine.wait_connected(DEADLINE_S))


def lookups(child: Any, count: int) -> list[float]:
    """Seconds that each of some lookups took."""
    took_s = []
    for _ in range(count):
        began_s = time.perf_counter()
        assert child.lookup(1, 4 * CHUNK) == 0
        took_s.append(time.perf_counter() - began_s)
    return took_s


def test_stopped_server_costs_a_deadline_then_microseconds_and_all_works_again(pool: Pool) -> None:
    pool.start_holder("shm:0", SIZE)
    engines = [pool.engine(**IMPATIENT) for _ in range(2)]
    engines[0].call("store", 1, 4 * CHUNK)
    with pool.server_stopped():
        for engine in engines:
            (first_s,) = engine.call("run", lookups, 1)
            assert first_s < 0.3 + 1.0, "a miss by its deadline"
            rest_s = sorted(engine.call("run", lookups, 1_000))
            assert rest_s[990] < 1e-3
            assert engine.call("retrieve", 1, 4 * CHUNK) == (0, 0)
            engine.call("store", 2, 4 * CHUNK)
    for engine in engines:
        assert engine.call("run", connected)
        assert engine.call("retrieve", 1, 4 * CHUNK) == (4 * CHUNK, 0)
        engine.call("store", 3, 4 * CHUNK)
        assert engine.call("retrieve", 3, 4 * CHUNK) == (4 * CHUNK, 0)
        assert not engine.call("stats").get("client_connections_lost"), "its session never ended"
    pool.assert_nothing_leaks()


def test_server_stopped_and_woken_in_the_middle_of_traffic(pool: Pool) -> None:
    """What was asked while it slept is answered when nobody waits for it any more: none of that may leak."""
    pool.start_holder("shm:0", SIZE)
    workers = [pool.engine(size="1MiB", **IMPATIENT), pool.engine(**IMPATIENT)]
    flow = Traffic(pool, workers)
    for _ in range(3):
        flow.wait_served()
        with client(pool, **IMPATIENT) as probe, pool.server_stopped():
            eventually(lambda: not client_pool.answers(probe), "it is known not to answer")
    flow.wait_served()
    flow.end()
    pool.assert_nothing_leaks()


def test_dead_server_is_known_at_once(pool: Pool) -> None:
    engine = pool.engine(size=SIZE, **PATIENT)
    engine.call("store", 1, 4 * CHUNK)
    pool.kill_server()
    assert sum(engine.call("run", lookups, 1_000)) < 5.0, "nobody waits for a server that is dead"
    assert sorted(engine.call("run", lookups, 1_000))[990] < 1e-3


# -- the table is lost


def flip_in_header(table: Path) -> None:
    """A bit of the lineage."""
    _flip(table, 40)


def flip_in_a_committed_record(table: Path) -> None:
    """A bit of a chunk's key."""
    _flip(table, _committed_record(table) + RECORD.fields["key"][1] + 5)  # type: ignore[index]


def flip_in_a_state(table: Path) -> None:
    """A bit of a record's first word."""
    _flip(table, _committed_record(table) + 3)


def cut_short(table: Path) -> None:
    """As a full disk would leave it; under another name, since it is mapped."""
    whole = table.read_bytes()
    table.unlink()
    table.write_bytes(whole[: len(whole) // 2])
    table.chmod(0o600)


def delete(table: Path) -> None:
    """It is gone."""
    table.unlink()


def _committed_record(table: Path) -> int:
    raw = table.read_bytes()
    first = 4096 + 256 * RECORD.itemsize
    return next(at for at in range(first, len(raw), RECORD.itemsize) if raw[at + 3] >> 4 == 3)


def _flip(table: Path, at: int) -> None:
    with table.open("r+b") as file:  # in place: readers have it mapped
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


DAMAGE = [flip_in_header, flip_in_a_committed_record, flip_in_a_state, cut_short, delete]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_lost_table_is_a_cold_start_with_new_memory(pool: Pool, damage: Callable[[Path], None]) -> None:
    holder, _ = pool.start_holder("shm:0", SIZE)
    engine = pool.engine(device="shm:1", size=SIZE, **IMPATIENT)
    for seed in range(1, 40):
        engine.call("store", seed, 8 * CHUNK)
    before = {(row.segment_id, row.incarnation) for row in pool.statistics().segments}
    with client(pool, lends=MIB) as bare:
        assert client_pool.store(bare, [1, 2, 3]) == 3
        grants = [
            bare.acquire([client_pool.key(1)], layout=client_pool.LAYOUT, pin=pin) for pin in (True, False)
        ]
        for grant in grants:
            assert client_pool.count_right(bare, grant, [1]) == 1
            assert bare.intact(grant)
        pool.kill_server()
        damage(pool.path / "extents")
        pool.start_server()
        assert holder.stdout is not None
        assert json.loads(holder.stdout.readline())["pid"] == holder.pid, "it lends new memory, and says so"
        pool.eventually(lambda pool: len(pool.statistics().segments) == 3, "all lend segments again")
        assert bare.wait_connected(DEADLINE_S)
        assert engine.call("run", connected)
        assert not any(bare.intact(grant) for grant in grants), "what was granted before counts no more"
        after = {(row.segment_id, row.incarnation) for row in pool.statistics().segments}
        assert not before & after, "writers of the old table may be asleep"
        assert bare.lookup([client_pool.key(1)], client_pool.LAYOUT) == 0
        assert engine.call("retrieve", 1, 8 * CHUNK) == (0, 0)
        for seed in range(1, 10):
            engine.call("store", seed, 8 * CHUNK)
            assert engine.call("retrieve", seed, 8 * CHUNK) == (8 * CHUNK, 0)
        assert client_pool.store(bare, [1, 4]) == 2
        assert client_pool.read(bare, [1, 4]) == 2
        assert engine.call("stats")["client_cold_starts"] == 1
    pool.assert_nothing_leaks()


def test_table_lost_in_the_middle_of_traffic(pool: Pool) -> None:
    pool.start_holder("shm:0", SIZE)
    workers = [pool.engine(size="1MiB", **IMPATIENT), pool.engine(**IMPATIENT)]
    flow = Traffic(pool, workers)
    for damage in itertools.islice(itertools.cycle([delete, flip_in_a_committed_record]), 3):
        flow.wait_served()
        pool.kill_server()
        damage(pool.path / "extents")
        pool.start_server()
    flow.wait_served()
    flow.end()
    pool.assert_nothing_leaks()
    for worker in workers:
        assert worker.call("stats")["client_cold_starts"] == 3
