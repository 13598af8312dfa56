"""The Mooncake tier against a real master and real holders, also where they hang or die."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch

from tests.mooncake.store import (
    LAYOUT,
    MIB,
    SIZE,
    Store,
    chunk,
    is_here,
    key,
    wait_until_works,
)
from tests.processes.worker import DEADLINE_S, eventually
from vcache.config import MooncakeConfig
from vcache.engine.lower import LowerTiers
from vcache.engine.stats import Counters
from vcache.errors import EngineClosed, ForkedProcess, Unavailable
from vcache.tiers import Tier
from vcache.tiers.mooncake.codes import Meaning, meaning_of
from vcache.tiers.mooncake.master import Master
from vcache.tiers.mooncake.tier import MooncakeTier
from vcache.tiers.record import header_for


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as store:
        yield store


def test_codes_have_a_meaning() -> None:
    assert meaning_of(0) is Meaning.DONE
    assert meaning_of(33_554_432) is Meaning.DONE
    assert [meaning_of(code) for code in (-200, -600, -704, -706, -800, -900)] == [
        Meaning.FULL,
        Meaning.MISFIT,
        Meaning.MISS,
        Meaning.BUSY,
        Meaning.HOLDER,
        Meaning.MASTER,
    ]
    assert meaning_of(-12345) is Meaning.OTHER


def test_it_is_a_tier(store: Store) -> None:
    store.holder()
    tier = store.tier()
    assert isinstance(tier, Tier)
    assert tier.put(key(1), chunk(1), LAYOUT)
    assert tier.contains([key(1), key(2)]) == [True, False]
    assert is_here(tier, 1)
    assert not is_here(tier, 2)
    assert tier.remove([key(1), key(2)]) == 1  # within the lease that the get took
    assert not is_here(tier, 1)
    tier.put(key(3), chunk(3), LAYOUT)
    tier.clear()
    assert tier.contains([key(3)]) == [False]


def test_a_key_that_is_there_keeps_what_it_has(store: Store) -> None:
    store.holder()
    tier = store.tier()
    assert tier.put(key(1), chunk(1), LAYOUT)
    assert tier.put(key(1), chunk(2), LAYOUT)
    assert is_here(tier, 1)


def test_namespaces_share_nothing(store: Store) -> None:
    store.holder()
    ours, theirs = store.tier(), store.tier(namespace="theirs.2")
    for tier in (ours, theirs):
        tier.put(key(1), chunk(1), LAYOUT)
    ours.clear()
    assert ours.contains([key(1)]) == [False]
    assert is_here(theirs, 1)


def test_what_is_not_the_chunk_is_a_miss_and_deleted(store: Store) -> None:
    """Another length, another layout, damaged bytes, and what is no record at all."""
    store.holder()
    tier = store.tier()
    for number in (1, 2, 3):
        tier.put(key(number), chunk(number), LAYOUT)
    assert not is_here(tier, 1, size=SIZE // 2)
    assert not is_here(tier, 2, size=2 * SIZE)
    assert not is_here(tier, 3, layout=b"M" * 16)
    damaged = chunk(4).numpy().copy()
    header = header_for(key(4), LAYOUT, damaged, 1).pack()
    damaged[5] ^= 1
    with tier._native.store(1.0) as client:
        client.put(tier._named(key(4)), header + damaged.tobytes())
        client.put(tier._named(key(5)), b"x" * (SIZE + len(header)))
    assert not is_here(tier, 4)
    assert not is_here(tier, 5)
    assert tier.contains([key(number) for number in range(1, 6)]) == [False] * 5


def test_chunks_of_any_size(store: Store) -> None:
    store.holder(lend=256 * MIB)
    tier = store.tier()
    for number, size in enumerate([1, 4095, 3 * MIB, 32 * MIB]):
        assert tier.put(key(number), chunk(number, size), LAYOUT)
        assert is_here(tier, number, size)


def test_age_and_expiry(store: Store) -> None:
    store.holder()
    tier = store.tier(ttl_s=100.0)
    now_s = 1_000.0
    tier._clock = lambda: now_s
    tier.put(key(1), chunk(1), LAYOUT)
    tier.put(key(2), chunk(2), LAYOUT, 1_050_000)
    found = tier.get(key(2), torch.empty(SIZE, dtype=torch.uint8), LAYOUT)
    assert found is not None
    assert found.expires_ms == 1_050_000
    now_s = 1_060.0
    assert is_here(tier, 1)
    assert not is_here(tier, 2)
    now_s = 1_100.0
    assert not is_here(tier, 1)


def test_views_of_one_memory_by_two_calls(store: Store) -> None:
    """Two threads put the same pinned extent: it is registered once, until the last one is done."""
    store.holder()
    first, second = store.tier(), store.tier(namespace="other")
    memory, failures = chunk(1), []

    def put(tier: MooncakeTier) -> None:
        try:
            for _ in range(50):
                tier.put(key(1), memory, LAYOUT)
        except Unavailable as error:
            failures.append(error)

    threads = [threading.Thread(target=put, args=(tier,)) for tier in (first, first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not failures
    assert is_here(first, 1)


def test_a_full_segment_evicts_and_the_puts_succeed(store: Store) -> None:
    store.holder(lend=32 * MIB)
    tier = store.tier()
    kept = [tier.put(key(number), chunk(number), LAYOUT) for number in range(100)]
    assert all(kept)
    assert 0 < sum(tier.contains([key(number) for number in range(100)])) < 100


def test_without_any_holder_nothing_is_kept(store: Store) -> None:
    tier = store.tier()
    assert not tier.put(key(1), chunk(1), LAYOUT)
    assert not is_here(tier, 1)


def test_no_master_is_said_soon_and_one_that_comes_is_used() -> None:
    master = Master(lease_s=0.2)
    tier = MooncakeTier(MooncakeConfig(master=master.address, protocol="tcp", lend=16 * MIB))
    try:
        with pytest.raises(Unavailable, match=r"tiers\.mooncake\.master: nobody answers"):
            tier.contains([key(1)])
        with master:
            assert tier.wait_ready(DEADLINE_S)
            assert tier.put(key(1), chunk(1), LAYOUT)
            assert is_here(tier, 1)
            tier.close()
    finally:
        tier.close()


def test_no_http_metadata_server_is_said_soon(store: Store) -> None:
    tier = MooncakeTier(MooncakeConfig(**store.settings(metadata="http://127.0.0.1:9/metadata")))
    with pytest.raises(Unavailable, match=r"tiers\.mooncake\.metadata: nobody answers"):
        tier.contains([key(1)])
    tier.close()


def test_a_closed_tier_refuses_and_a_forked_child_too(store: Store) -> None:
    tier = store.tier()
    pid = os.fork()
    if not pid:
        try:
            tier.contains([key(1)])
        except ForkedProcess:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    tier.close()
    tier.close()
    with pytest.raises(EngineClosed, match="mooncake"):
        tier.contains([key(1)])


def test_the_http_metadata_server_works_too() -> None:
    with Store(http_metadata_port=0) as store:
        assert store.master.metadata.startswith("http://")
        store.holder()
        tier = store.tier()
        assert tier.put(key(1), chunk(1), LAYOUT)
        assert is_here(tier, 1)


def test_two_replicas_survive_the_death_of_one_holder(store: Store) -> None:
    holders = [store.holder(), store.holder()]
    tier = store.tier(replicas=2)
    for number in range(8):
        assert tier.put(key(number), chunk(number), LAYOUT)
    holders[0].kill()
    for number in range(8):
        eventually(lambda number=number: here_now(tier, number), f"chunk {number} is read")  # type: ignore[misc]


def here_now(tier: MooncakeTier, number: int) -> bool:
    try:
        return is_here(tier, number)
    except Unavailable:  # the copy that it tried was the dead one's, of which the master does not know yet
        return False


def test_a_dead_holder_costs_misses_and_its_keys_can_be_put_again(store: Store) -> None:
    """For seconds the master says that they are there, and takes puts of them without storing anything."""
    only = store.holder()
    tier = store.tier()
    assert tier.put(key(1), chunk(1), LAYOUT)
    only.kill()
    with pytest.raises(Unavailable, match=r"-800"):
        is_here(tier, 1)
    assert tier.contains([key(1)]) == [False]
    store.holder()
    wait_until_works(tier, range(100, 1_000))
    assert not is_here(tier, 1)
    eventually(lambda: put_quietly(tier, 1) and is_here(tier, 1), "the key can be put again")


def put_quietly(tier: MooncakeTier, number: int) -> bool:
    try:
        return tier.put(key(number), chunk(number), LAYOUT)
    except Unavailable:
        return False


def test_a_restarted_master_has_forgotten_everything_and_is_used_again(store: Store) -> None:
    store.holder()
    tier = store.tier()
    assert tier.put(key(1), chunk(1), LAYOUT)
    store.master.kill()
    with pytest.raises(Unavailable):
        tier.contains([key(1)])
    store.master.start()
    wait_until_works(tier, range(100, 1_000))
    assert not is_here(tier, 1)


def longest_silence(call: Callable[[], object]) -> float:
    """How long no other thread of this process came to run while this was called, in seconds."""
    ticks, over, pause = [time.monotonic()], threading.Event(), threading.Event()

    def tick() -> None:
        while not over.is_set():
            pause.wait(0.002)
            ticks.append(time.monotonic())

    ticking = threading.Thread(target=tick)
    ticking.start()
    call()
    over.set()
    ticking.join()
    return max(later - before for before, later in pairwise(ticks))


def test_a_frozen_master_stops_no_other_thread(store: Store) -> None:
    """Neither while a client connects, which is a miss, nor while one that was connected is closed."""
    store.holder()
    connected = store.tier()
    assert store.master.process is not None
    store.master.process.send_signal(signal.SIGSTOP)
    try:
        other = MooncakeTier(MooncakeConfig(**store.settings()))

        def connect() -> None:
            with pytest.raises(Unavailable, match=r"tiers\.mooncake\.master: nobody answers at"):
                other.contains([key(1)])

        silence_s = max(longest_silence(connect), longest_silence(connected.close))
    finally:
        store.master.process.send_signal(signal.SIGCONT)
    assert silence_s < DEADLINE_S / 4
    assert other.wait_ready(DEADLINE_S)
    other.close()


def test_a_frozen_holder_costs_the_deadline_and_keeps_what_it_was_lent(store: Store) -> None:
    """The engine's call returns; the memory is given back only when Mooncake's own call has returned."""
    holder = store.holder()
    tier, counters = store.tier(), Counters()
    assert tier.put(key(1), chunk(1), LAYOUT)
    lower = LowerTiers([tier], LAYOUT, counters, deadline_s=0.3)
    holder.signal(signal.SIGSTOP)
    into, given_back = torch.zeros(SIZE, dtype=torch.uint8), threading.Event()
    read = lower.read(key(1), into)
    assert read.found() is None and not read.is_over
    read.when_over(given_back.set)
    assert not given_back.is_set()
    assert tier._registered._uses.keys() >= {into.data_ptr()}
    assert counters.snapshot()["tier_late_calls"] == 1
    assert lower.contains([key(1)]) == [False], "the breaker is open"
    assert counters.snapshot()["tier_skipped_calls"] == 1
    holder.signal(signal.SIGCONT)
    assert given_back.wait(DEADLINE_S)
    eventually(lambda: into.data_ptr() not in tier._registered._uses, "the memory is registered no more")
    lower.close()
