"""Writers and readers that race, stop and die: no byte that is served may be wrong, and nothing may leak.

The pool is small: CHUNKS chunks, so that a store of that many evicts everything that may be evicted.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.processes import breakpoints
from tests.processes.content import LARGE_LAYOUT as LAYOUT
from tests.processes.content import kv_of, prompt
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S, Worker
from vcache.client import Client, Grant
from vcache.keys import KeyChain
from vcache.locks import lock_holder

CHUNK = LAYOUT.chunk_tokens
CHUNKS = 16
PROMPT = 4 * CHUNK
ALL = CHUNKS * CHUNK
SIZE = "2MiB"
EXTENT = 31 * 4096
LEASE_MS = 10

IMPATIENT: dict[str, Any] = {
    "client.request_timeout_ms": 200,
    "client.connect_timeout_ms": 200,
    "client.declare_interval_s": 60,
}
"""Of a client that is to be stopped past all deadlines: short ones. No declaration is under way when it
stops, lest it takes the answer, late by its own sleep, for a server that does not answer.
"""
PAST_ALL_S = 0.8
"""Longer than IMPATIENT's timeouts, LEASE_MS, and several ticks of the server's."""


@pytest.fixture
def pool() -> Iterator[Pool]:
    """A server with the shortest leases. Whatever the test did: in the end nothing leaks."""
    with Pool(lease_ms=LEASE_MS) as pool:
        pool.large = True
        pool.start_server()
        yield pool
        pool.assert_nothing_leaks()


@pytest.fixture
def lender(pool: Pool) -> Worker:
    """An engine that lends the pool its only segment."""
    return pool.engine(size=SIZE)


def assert_all_usable(pool: Pool, lender: Worker) -> None:
    """Every extent of the pool can be given away again: as many chunks as it has fit at once."""
    pool.assert_nothing_leaks()
    lender.call("store", 1_000, ALL)
    assert lender.call("retrieve", 1_000, ALL) == (ALL, 0)
    assert pool.counters()["chunks"] == CHUNKS


def keys_of(seed: int, count: int = PROMPT) -> list[bytes]:
    """The engine's keys of a prompt."""
    chain = KeyChain(LAYOUT.fingerprint, "test-model", 0, "", "")
    return chain.keys(prompt(seed, count), CHUNK, partial=False)


def rewrite(writer: Worker, seed: int) -> None:
    """Evict and write anew all that may be evicted."""
    writer.call("store", seed, ALL)


# ------------------------------------------------------------------------------- writers of one key


def test_of_two_writers_of_one_key_the_first_wins(pool: Pool, lender: Worker) -> None:
    """The loser's extents come back, whoever reserved first."""
    loser, winner, reader = (pool.engine() for _ in range(3))
    loser.call("stop_at", "gather", "after")
    loser.send("store", 1, PROMPT)
    loser.wait_stopped()
    assert pool.counters()["reservations"] == 4
    winner.call("store", 1, PROMPT)
    loser.wake()
    loser.result()
    assert winner.call("stats")["stored_chunks"] == 4
    lost = loser.call("stats")
    assert (lost["stored_chunks"], lost["present_chunks"], lost["unstored_chunks"]) == (0, 4, 0)
    assert pool.counters()["lost_commits"] == 4
    assert reader.call("retrieve", 1, PROMPT) == (PROMPT, 0)
    assert_all_usable(pool, lender)


def store_prompts(child: Any, seeds: list[int], count: int) -> None:
    """In a worker: store many prompts."""
    for seed in seeds:
        child.store(seed, count)


def test_writers_of_the_same_prompts_at_once(pool: Pool) -> None:
    """Each chunk is kept once, and is right."""
    writers = [pool.engine(device=f"shm:{number}", size="32MiB") for number in range(2)]
    seeds = list(range(60))
    for writer in writers:
        writer.send("run", store_prompts, seeds, PROMPT)
    for writer in writers:
        writer.result()
    for reader in writers:
        assert all(reader.call("retrieve", seed, PROMPT) == (PROMPT, 0) for seed in seeds)
    counters = pool.counters()
    assert (counters["chunks"], counters["replicas"]) == (4 * len(seeds), 0)
    assert counters["used_bytes"] == counters["chunks"] * EXTENT


# ----------------------------------------------------------------------------- readers and eviction


def read_prompts(child: Any, seeds: list[int], seconds: float) -> Counter[str]:
    """In a worker: retrieve random prompts for a while, with copies that take longer than a lease."""
    breakpoints.linger_at("scatter", 3 * LEASE_MS / 1e3)
    rng = random.Random(child.engine.get_stats()["own_segment"])
    seen: Counter[str] = Counter()
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        hit, wrong = child.retrieve(rng.choice(seeds), PROMPT)
        seen.update(calls=1, hit=hit, wrong=wrong)
    breakpoints.restore("scatter")
    seen["fence_broken"] = child.engine.get_stats()["failed_fence_broken"]
    return seen


def write_prompts(child: Any, seeds: list[int], seconds: float) -> int:
    """In a worker: store random prompts for a while; how often."""
    rng = random.Random(child.engine.get_stats()["own_segment"] + 1)
    until_s = time.monotonic() + seconds
    calls = 0
    while time.monotonic() < until_s:
        child.store(rng.choice(seeds), PROMPT)
        calls += 1
    return calls


def test_readers_while_everything_is_evicted_and_rewritten(pool: Pool, lender: Worker) -> None:
    """Two writers rewrite a pool that two readers read, leases long over: misses, never other bytes."""
    seconds, seeds = 2.0, list(range(12))
    readers, writers = [pool.engine(), pool.engine()], [lender, pool.engine()]
    for reader in readers:
        reader.send("run", read_prompts, seeds, seconds)
    for writer in writers:
        writer.send("run", write_prompts, seeds, seconds)
    seen: Counter[str] = Counter()
    for reader in readers:
        seen.update(reader.result())
    assert sum(writer.result() for writer in writers) > 0
    # How many fences break is up to the machine (tests/engine/test_failures.py breaks one on purpose).
    assert seen["wrong"] == 0, seen
    assert seen["hit"] > 0, seen
    assert_all_usable(pool, lender)


def read_grant(client: Client, grant: Grant) -> list[torch.Tensor]:
    """Copies of the chunks that were granted."""
    chunks = []
    for extent in grant.extents:
        segment = client.segment(int(extent["segment"]), grant.lineage)
        assert segment is not None
        borrow = segment.borrow()
        assert borrow is not None
        with borrow:
            chunks.append(segment.view(int(extent["offset"]), int(extent["length"])).cpu().clone())
    return chunks


def expected_chunks(seed: int) -> list[torch.Tensor]:
    """The bytes of a prompt's chunks."""
    kv = kv_of(seed, PROMPT, LAYOUT)
    chunks = [kv[:, :, at : at + CHUNK] for at in range(0, PROMPT, CHUNK)]
    return [chunk.contiguous().flatten().view(torch.uint8) for chunk in chunks]


def is_right(chunks: list[torch.Tensor], seed: int) -> bool:
    """Whether these are the bytes of a prompt."""
    return len(chunks) == 4 and all(map(torch.equal, chunks, expected_chunks(seed)))


def test_the_fence_is_broken_by_a_rewrite_and_by_nothing_less(pool: Pool, lender: Worker) -> None:
    """`intact` says so, and the bytes are as it says."""
    lender.call("store", 1, PROMPT)
    client = pool.observer
    grant = client.acquire(keys_of(1), layout=LAYOUT.fingerprint)
    assert is_right(read_grant(client, grant), 1)
    pool.eventually(lambda pool: not pool.counters()["leases"], "the lease expires")
    assert client.intact(grant), "the end of a lease alone breaks nothing"
    rewrite(lender, 2)
    assert not client.intact(grant)
    assert not is_right(read_grant(client, grant), 1)
    lender.call("store", 1, PROMPT)
    assert not client.intact(grant), "that the chunks are there again mends nothing"


def test_what_is_pinned_stays(pool: Pool, lender: Worker) -> None:
    """Neither eviction nor removal takes a pinned chunk's bytes; they are free when the pin ends."""
    lender.call("store", 1, PROMPT)
    client = pool.observer
    grant = client.acquire(keys_of(1), layout=LAYOUT.fingerprint, pin=True)
    for seed in (2, 3):
        rewrite(lender, seed)
        assert lender.call("lookup", seed, ALL) == ALL - PROMPT, "the pinned extents are not to be had"
    assert client.remove(keys_of(1)) == 4
    assert lender.call("lookup", 1, PROMPT) == 0
    rewrite(lender, 4)
    assert is_right(read_grant(client, grant), 1)
    assert client.intact(grant)
    client.release(grant)
    assert_all_usable(pool, lender)


# -------------------------------------------------------------------------------- readers that stop


WHERE = pytest.mark.parametrize("where", ["before", "amid", "after"])


@WHERE
def test_a_reader_woken_after_its_extents_were_rewritten_counts_a_miss(
    pool: Pool, lender: Worker, where: str
) -> None:
    """Stopped past its lease, whatever of the copy was done by then."""
    lender.call("store", 1, PROMPT)
    reader = pool.engine(**IMPATIENT)
    stopped_in_retrieve(pool, reader, where)
    rewrite(lender, 2)
    assert lender.call("lookup", 1, PROMPT) == 0, "nobody waits for a reader whose lease is over"
    reader.wake()
    assert reader.result() == (0, 0)
    stats = reader.call("stats")
    assert (stats["failed_fence_broken"], stats["hits"], stats["misses"]) == (1, 0, 4)


@WHERE
def test_a_reader_woken_late_reads_what_was_stored_again(pool: Pool, lender: Worker, where: str) -> None:
    """Its first copy does not count, its second one does."""
    lender.call("store", 1, PROMPT)
    reader = pool.engine()
    stopped_in_retrieve(pool, reader, where)
    rewrite(lender, 2)
    lender.call("store", 1, PROMPT)
    reader.wake()
    assert reader.result() == (PROMPT, 0)
    assert reader.call("stats")["failed_fence_broken"] == 1


def test_a_reader_woken_late_hits_what_nobody_rewrote(pool: Pool, lender: Worker) -> None:
    """The fence decides, not the clock."""
    lender.call("store", 1, PROMPT)
    reader = pool.engine()
    stopped_in_retrieve(pool, reader, "amid")
    reader.wake()
    assert reader.result() == (PROMPT, 0)
    assert reader.call("stats")["failed_fence_broken"] == 0


def stopped_in_retrieve(pool: Pool, reader: Worker, where: str) -> None:
    """Have a reader stop itself in a retrieve, and wait until its lease is over."""
    reader.call("stop_at", "scatter", where)
    reader.send("retrieve", 1, PROMPT)
    reader.wait_stopped()
    pool.eventually(lambda pool: not pool.counters()["leases"], "the reader's lease expires")


def test_a_reader_stopped_while_the_server_is_killed_and_restarted(pool: Pool, lender: Worker) -> None:
    """The next server knows of no lease. Its writers break the same fence."""
    lender.call("store", 1, PROMPT)
    reader = pool.engine(**IMPATIENT)
    stopped_in_retrieve(pool, reader, "amid")
    pool.kill_server()
    pool.start_server()
    wait_until_back(pool, lender)
    assert lender.call("lookup", 1, PROMPT) == PROMPT, "the pool is warm"
    rewrite(lender, 2)
    assert lender.call("lookup", 2, ALL) == ALL
    reader.wake()
    assert reader.result() == (0, 0)
    assert reader.call("stats")["failed_fence_broken"] == 1


def pin(child: Any, keys: list[bytes]) -> int:
    """In a worker with a client: pin chunks; how many it got."""
    child.kept["grant"] = grant = child.client.acquire(keys, layout=LAYOUT.fingerprint, pin=True)
    return len(grant.extents)


def pinned_bytes_are_right(child: Any, seed: int) -> bool:
    """In a worker with a client: read what it pinned, check it, and let go of it."""
    grant = child.kept["grant"]
    right = is_right(read_grant(child.client, grant), seed)
    intact = child.client.intact(grant)
    child.client.release(grant)
    return right and intact


def pinning_reader(pool: Pool, lender: Worker) -> Worker:
    """A process that has a prompt pinned."""
    lender.call("store", 1, PROMPT)
    reader = pool.start_worker()
    assert reader.call("open_client", **{**pool.client_config(), **IMPATIENT})
    assert reader.call("run", pin, keys_of(1)) == 4
    assert pool.counters()["pins"] == 4
    return reader


def test_a_reader_killed_with_pins(pool: Pool, lender: Worker) -> None:
    """They end with it, and their extents are usable again."""
    reader = pinning_reader(pool, lender)
    rewrite(lender, 2)
    assert lender.call("lookup", 2, ALL) == ALL - PROMPT
    reader.kill()
    pool.eventually(lambda pool: not pool.counters()["pins"], "the pins end")
    assert_all_usable(pool, lender)


def test_a_stopped_readers_pins_hold(pool: Pool, lender: Worker) -> None:
    """Woken past every deadline it still reads what it pinned."""
    reader = pinning_reader(pool, lender)
    reader.stop()
    for_a_while(lambda seed: rewrite(lender, seed))
    reader.wake()
    assert reader.call("run", pinned_bytes_are_right, 1)
    assert_all_usable(pool, lender)


# -------------------------------------------------------------------------------- writers that stop


def for_a_while(step: Callable[[int], object]) -> None:
    """Call `step` with 2, 3, … until every deadline has passed, and at least twice."""
    until_s = time.monotonic() + PAST_ALL_S
    seed = 2
    while seed < 4 or time.monotonic() < until_s:
        step(seed)
        seed += 1


def stopped_in_store(pool: Pool, where: str) -> Worker:
    """A writer that has stopped itself between reserve and commit, its chunks copied as far as `where`."""
    writer = pool.engine(**IMPATIENT)
    writer.call("stop_at", "gather", where)
    writer.send("store", 1, PROMPT)
    writer.wait_stopped()
    assert pool.counters()["reservations"] == 4
    assert pool.counters()["chunks"] == 0, "what is not committed is not visible"
    return writer


@WHERE
def test_a_writer_killed_between_reserve_and_commit(pool: Pool, lender: Worker, where: str) -> None:
    """Its reservation ends with it; nothing of it was ever seen."""
    writer = stopped_in_store(pool, where)
    writer.kill()
    pool.eventually(lambda pool: not pool.counters()["reservations"], "the reservation ends")
    assert lender.call("lookup", 1, PROMPT) == 0
    assert_all_usable(pool, lender)


@WHERE
def test_a_writer_stopped_past_every_deadline(pool: Pool, lender: Worker, where: str) -> None:
    """Nobody else is given its extents meanwhile; woken it commits, and every byte is right."""
    writer = stopped_in_store(pool, where)
    reader = pool.engine()

    def fill(seed: int) -> None:
        rewrite(lender, seed)
        assert reader.call("retrieve", seed, ALL) == (ALL - PROMPT, 0)
        assert pool.counters()["reservations"] == 4

    for_a_while(fill)
    writer.wake()
    writer.result()
    assert reader.call("retrieve", 1, PROMPT) == (PROMPT, 0)
    assert writer.call("stats")["stored_chunks"] == 4
    assert_all_usable(pool, lender)


@pytest.mark.parametrize("lock", ["its lock held", "its lock removed by somebody"])
def test_a_writer_stopped_while_the_server_is_killed_and_restarted(
    pool: Pool, lender: Worker, lock: str
) -> None:
    """Its reservation survives the server. Woken it commits, or is told that it cannot; nothing is wrong."""
    writer = stopped_in_store(pool, "amid")
    reader = pool.engine()
    if lock == "its lock removed by somebody":  # a lock that is not there says nothing of its owner
        for path in (pool.path / "sessions").iterdir():
            if lock_holder(path) == writer.pid:
                path.unlink()
    for restart in range(2):
        pool.kill_server()
        pool.start_server()
        wait_until_back(pool, lender, reader)
        rewrite(lender, 20 + restart)
        assert reader.call("retrieve", 20 + restart, ALL) == (ALL - PROMPT, 0)
        assert pool.counters()["reservations"] == 4
    writer.wake()
    writer.result()
    hit, wrong = reader.call("retrieve", 1, PROMPT)
    assert (hit, wrong) == (writer.call("stats")["stored_chunks"] * CHUNK, 0)
    assert reader.call("retrieve", 21, ALL) == (ALL - PROMPT, 0), "it wrote over others' chunks"
    wait_until_back(pool, writer)
    assert_all_usable(pool, lender)


def test_a_writer_stopped_while_the_pool_is_lost(pool: Pool, lender: Worker) -> None:
    """The next server begins cold, with new memory: the late write goes to the old one, and nowhere else."""
    writer = stopped_in_store(pool, "amid")
    reader = pool.engine()
    pool.kill_server()
    (pool.path / "extents").unlink()
    pool.start_server()
    wait_until_back(pool, lender, reader)
    pool.eventually(lambda pool: pool.statistics().segments, "the lender lends new memory")
    lender.call("store", 2, ALL)
    assert reader.call("retrieve", 2, ALL) == (ALL, 0)
    writer.wake()
    writer.result()
    assert writer.call("stats")["stored_chunks"] == 0
    assert reader.call("retrieve", 1, PROMPT) == (0, 0)
    assert reader.call("retrieve", 2, ALL) == (ALL, 0), "it wrote over others' chunks"
    wait_until_back(pool, writer)
    assert_all_usable(pool, lender)


def wait_connected(child: Any) -> bool:
    """In a worker: wait until its engine's requests go through."""
    return bool(child.engine.wait_connected(DEADLINE_S))


def wait_until_back(pool: Pool, *workers: Worker) -> None:
    """Wait until the server of now has these workers' sessions, and they know it."""
    pids = {worker.pid for worker in workers}
    pool.eventually(
        lambda pool: pids <= {row.pid for row in pool.statistics().sessions if row.here}, "they are back"
    )
    assert all(worker.call("run", wait_connected) for worker in workers)


# -------------------------------------------------------------------------------- all of it at once


def read_and_write(child: Any, seeds: list[int], seconds: float) -> int:
    """In a worker: store and retrieve random prompts for a while; tokens that were wrong."""
    rng = random.Random(child.engine.get_stats()["own_segment"])
    until_s, wrong = time.monotonic() + seconds, 0
    while time.monotonic() < until_s:
        seed = rng.choice(seeds)
        child.store(seed, PROMPT)
        wrong += child.retrieve(rng.choice(seeds), PROMPT)[1]
    return wrong


def test_processes_that_are_stopped_woken_and_killed_anywhere(pool: Pool, lender: Worker) -> None:
    """Signals land where they land; who survives has seen no wrong byte, and nothing leaks."""
    seconds, seeds, rng = 2.0, list(range(10)), random.Random(5)
    workers = [pool.engine(**IMPATIENT) for _ in range(4)]
    until_s = time.monotonic() + seconds
    for worker in workers:
        worker.send("run", read_and_write, seeds, seconds)
    while time.monotonic() < until_s:
        worker = rng.choice(workers)
        if len(workers) > 2 and rng.random() < 0.1:
            workers.remove(worker)
            worker.kill()
            continue
        worker.stop()
        rewrite(lender, 100 + rng.randrange(3))
        worker.wake()
    assert [worker.result() for worker in workers] == [0] * len(workers)
    for worker in workers:
        stats = worker.call("stats")
        assert stats["client_reserved"] == stats["client_pinned"] == 0
    assert_all_usable(pool, lender)
