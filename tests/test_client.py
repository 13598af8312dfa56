"""The client against a real server: what it grants, what it refuses, and what it does when the server is not
there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.client_pool import (
    DEADLINE_S,
    LAYOUT,
    NAMESPACE,
    SIZE,
    Pool,
    answers,
    descriptors,
    held,
    key,
    pool_in_memory,
    read,
    store,
    until,
)
from tests.processes.worker import eventually
from vcache.errors import ArgumentError, EngineClosed, Unavailable
from vcache.limits import MIB
from vcache.protocol import Outcome


@pytest.fixture
def empty() -> Iterator[Pool]:
    """A directory without a server."""
    with pool_in_memory() as pool:
        yield pool


@pytest.fixture
def pool(empty: Pool) -> Pool:
    """A directory with a server."""
    empty.start()
    return empty


# -- with a server


def test_one_client_stores_and_another_reads(pool: Pool) -> None:
    writer, reader = pool.client("writer", lends=4 * MIB), pool.client("reader")
    assert store(writer, [1, 2, 3]) == 3
    assert reader.lookup([key(1), key(2), key(9), key(3)], LAYOUT) == 2
    assert reader.lookup([key(1)], b"x" * 16) == 0
    assert reader.contains([key(3), key(9)]) == [True, False]
    assert read(reader, [1, 2, 3]) == 3
    assert read(reader, [1, 2, 3], pin=True) == 3
    assert reader.remove([key(2)]) == 1
    assert read(reader, [1, 2, 3]) == 1
    reader.check()
    until(lambda: held(reader) == (0, 0), "everything was given back")


def test_an_answer_is_waited_for_in_several_goes(pool: Pool) -> None:
    client = pool.client(lends=4 * MIB)
    store(client, [1, 2])
    with pool.stopped():
        asked = [client.begin_acquire([key(number)], layout=LAYOUT, pin=True) for number in (1, 2)]
        assert [each.result(0.0) for each in asked] == [None, None]
        assert asked[0].result(0.001) is None
    late = asked[0]._asked
    assert late._channel.socket.poll(DEADLINE_S * 1e3)
    late._deadline_s = 0.0  # nobody looked in time: what has come counts all the same
    grants = [each.result() for each in asked[::-1]]
    assert [None if each is None else len(each.extents) for each in grants] == [1, 1]
    for grant in grants:
        assert grant is not None
        client.release(grant)
    assert client.counters["outstanding"] == 0
    until(lambda: held(client) == (0, 0), "everything was given back")


def test_what_is_granted_after_somebody_gave_up_comes_back(pool: Pool) -> None:
    client = pool.client(lends=4 * MIB)
    store(client, [1])
    with pool.stopped():
        asked = client.begin_acquire([key(1)], layout=LAYOUT, pin=True)
        assert asked.result(0.001) is None
        asked.give_up()
        assert client.counters["outstanding"] == 0
    assert read(client, [1]) == 1
    until(lambda: held(client) == (0, 0), "everything was given back")


def test_segment_of_a_peer_is_mapped_once_and_unmapped_when_it_goes(pool: Pool) -> None:
    holder, reader = pool.client("holder", lends=4 * MIB), pool.client("reader")
    store(holder, [1])
    grant = reader.acquire([key(1)], layout=LAYOUT)
    number = int(grant.extents["segment"][0])
    memory = reader.segment(number, grant.lineage)
    assert memory is not None
    assert reader.segment(number, grant.lineage) is memory
    assert reader.segment(number, grant.lineage + 1) is None
    assert reader.segment(999, grant.lineage) is None
    assert reader.intact(grant)
    holder.close()
    until(lambda: memory.gone, "the mapping went with its holder")
    assert not reader.intact(grant)
    assert reader.segment(number, grant.lineage) is None


def test_blank_reservation_is_bound_at_commit_and_the_second_writer_loses(pool: Pool) -> None:
    first, second = pool.client("first", lends=4 * MIB), pool.client("second")
    stock = first.reserve_blank(2, layout=LAYOUT, size=SIZE)
    other = second.reserve_blank(1, layout=LAYOUT, size=SIZE)
    one = stock.extents[:1]
    assert first.commit(one, [key(1)], [SIZE], namespace=NAMESPACE) == bytes([Outcome.COMMITTED])
    lost = second.commit(other.extents, [key(1)], [SIZE], namespace=NAMESPACE, keep_lost=True)
    assert lost == bytes([Outcome.LOST])
    assert second.counters["reserved"] == 1
    assert second.commit(other.extents, [key(2)], [SIZE], namespace=NAMESPACE) == bytes([Outcome.COMMITTED])
    assert first.commit(one, [key(3)], [SIZE], namespace=NAMESPACE) == bytes([Outcome.STALE])
    first.abort(stock.extents)
    assert held(first) == (0, 0)


def test_reserve_says_what_is_there_and_what_fitted(pool: Pool) -> None:
    client = pool.client(lends=4 * MIB)
    store(client, [1])
    got = client.reserve([key(1), key(2)], layout=LAYOUT, size=SIZE)
    assert (got.present, got.wanted, len(got.extents)) == ([True, False], 1, 1)
    rest = client.reserve_blank(1000, layout=LAYOUT, size=SIZE)
    assert 0 < len(rest.extents) < rest.wanted == 1000


def test_wrong_arguments_name_the_field(pool: Pool) -> None:
    client = pool.client(lends=4 * MIB)
    with pytest.raises(ArgumentError, match=r"keys\[1\]: got 3 bytes, wanted 32 bytes"):
        client.lookup([key(1), b"abc"], LAYOUT)
    with pytest.raises(ArgumentError, match="layout: got 2 bytes, wanted 16 bytes"):
        client.lookup([key(1)], b"xx")
    with pytest.raises(ArgumentError, match="size: got 0"):
        client.reserve([key(1)], layout=LAYOUT, size=0)
    with pytest.raises(ArgumentError, match="keys: got 20000 keys"):
        client.contains([key(1)] * 20_000)
    got = client.reserve([key(1)], layout=LAYOUT, size=SIZE)
    with pytest.raises(ArgumentError, match="namespace: got 1 bytes"):
        client.commit(got.extents, [key(1)], [SIZE], namespace=b"x")
    assert client.counters["reserved"] == 0, "what commit was called with is the caller's no more"
    assert held(client) == (0, 0)


def test_many_threads_make_requests_at_once(pool: Pool) -> None:
    client = pool.client(lends=16 * MIB)
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda n: store(client, [n, n + 1000]), range(50))) == [2] * 50
        assert list(threads.map(lambda n: read(client, [n, n + 1000]), range(50))) == [2] * 50
    client.check()
    assert held(client) == (0, 0)


def test_closed_client_says_so_and_leaves_nothing(pool: Pool) -> None:
    pool.client("other")
    before = descriptors()
    client = pool.client(lends=4 * MIB)
    client.close()
    client.close()
    assert descriptors() == before
    assert not client.connected
    for call in (client.ping, lambda: client.lookup([], LAYOUT), lambda: client.wait_connected(1)):
        with pytest.raises(EngineClosed):
            call()
    locks = pool.path / "sessions"
    eventually(
        lambda: len(list(locks.iterdir())) == 1, "the server removed its lock, and not the other one's"
    )


def test_lost_abort_and_release_come_back_by_declaration(pool: Pool) -> None:
    client = pool.client(lends=4 * MIB, **{"client.declare_interval_s": 0.05})
    store(client, [1])
    got = client.reserve_blank(3, layout=LAYOUT, size=SIZE)
    pinned = client.acquire([key(1)], layout=LAYOUT, pin=True)
    assert held(client) == (3 * SIZE, 1)
    # What a client does whose message is lost: it changes its books, and nothing arrives.
    client._session.ledger.drop_reserved([(i, s) for i, s in _handles(got.extents)])
    client._session.ledger.drop_pin(pinned.right)
    until(lambda: held(client) == (0, 0), "the declaration gave it back")


def _handles(extents: object) -> list[tuple[int, int]]:
    from vcache.client.grants import handles_of

    return handles_of(extents)  # type: ignore[arg-type]


# -- without one


def test_client_without_a_server_refuses_at_once_and_connects_when_it_comes(empty: Pool) -> None:
    client = empty.client(lends=4 * MIB, wait=False)
    times = []
    for _ in range(300):
        started = time.perf_counter()
        with pytest.raises(Unavailable):
            client.lookup([key(1)], LAYOUT)
        times.append(time.perf_counter() - started)
    assert sorted(times)[int(len(times) * 0.99)] < 1e-3
    assert not client.wait_connected(0)
    empty.start()
    assert client.wait_connected(DEADLINE_S)
    assert store(client, [1]) == 1


def test_killed_server_comes_back_and_the_pool_is_warm(pool: Pool) -> None:
    writer, reader = pool.client("writer", lends=4 * MIB), pool.client("reader")
    assert store(writer, [1, 2]) == 2
    kept = writer.reserve_blank(1, layout=LAYOUT, size=SIZE)
    lease = reader.acquire([key(1)], layout=LAYOUT)
    pin = reader.acquire([key(2)], layout=LAYOUT, pin=True)
    for grant in (lease, pin):
        assert reader.segment(int(grant.extents["segment"][0]), grant.lineage) is not None
    own = writer.own_segment
    pool.kill()
    until(lambda: not reader.connected and not writer.connected, "the end of the connection was noticed")
    with pytest.raises(Unavailable):
        reader.lookup([key(1)], LAYOUT)
    assert reader.intact(lease), "what was read stays good without a server"
    pool.start()
    assert writer.wait_connected(DEADLINE_S)
    assert reader.wait_connected(DEADLINE_S)
    assert writer.own_segment == own
    assert read(reader, [1, 2]) == 2
    assert reader.intact(pin)
    until(lambda: held(writer) == (SIZE, 1), "reservation and pin are still ours")
    assert writer.commit(kept.extents, [key(3)], [SIZE], namespace=NAMESPACE) == bytes([Outcome.COMMITTED])
    reader.release(pin)
    until(lambda: held(writer) == (0, 0), "nothing leaked")
    reader.check()


def test_cold_start_voids_everything_and_lends_new_memory(pool: Pool) -> None:
    writer, reader = pool.client("writer", lends=4 * MIB), pool.client("reader")
    store(writer, [1])
    old = writer.reserve_blank(1, layout=LAYOUT, size=SIZE)
    grant = reader.acquire([key(1)], layout=LAYOUT)
    memory = reader.segment(int(grant.extents["segment"][0]), grant.lineage)
    assert memory is not None
    assert reader.intact(grant)
    pool.kill()
    with (pool.path / "extents").open("r+b") as table:  # in place: it is mapped
        table.seek(20)
        table.write(b"damaged")
    pool.start()
    until(lambda: writer.counters.get("cold_starts") == 1, "the writer began anew")
    assert writer.wait_connected(DEADLINE_S)
    assert reader.wait_connected(DEADLINE_S)
    until(lambda: memory.gone, "the old mapping went")
    assert not reader.intact(grant)
    assert reader.lookup([key(1)], LAYOUT) == 0
    assert store(writer, [1]) == 1
    fresh = writer.reserve_blank(4, layout=LAYOUT, size=SIZE)
    assert writer.commit(old.extents, [key(7)], [SIZE], namespace=NAMESPACE) == bytes([Outcome.STALE])
    writer.abort(old.extents)
    assert held(writer)[0] == 4 * SIZE, "an old handle does not touch a new extent"
    assert writer.segment(int(old.extents["segment"][0]), old.lineage) is None
    writer.abort(fresh.extents)


def test_server_killed_in_the_middle_of_traffic(pool: Pool) -> None:
    timeout = {"client.request_timeout_ms": 200}
    writer = pool.client("writer", lends=8 * MIB, **timeout)
    readers = [pool.client("reader", **timeout) for _ in range(2)]
    stop = threading.Event()
    longest = [0.0]

    def traffic(seed: int) -> int:
        good = 0
        client = [writer, *readers][seed % 3]
        number = seed
        while not stop.is_set():
            number = (number * 7 + 3) % 60
            started = time.monotonic()
            try:
                good += (
                    store(client, [number, number + 1]) if seed % 2 else read(client, [number, number + 1])
                )
            except Unavailable:
                stop.wait(0.002)
            longest[0] = max(longest[0], time.monotonic() - started)
        return good

    with ThreadPoolExecutor(6) as threads:
        running = [threads.submit(traffic, seed) for seed in range(6)]
        try:
            for _ in range(3):
                until(lambda: store_any(writer), "traffic goes on")
                pool.kill()
                until(lambda: not any(client.connected for client in (writer, *readers)), "all noticed")
                pool.start()
                until(lambda: all(map(answers, (writer, *readers))), "all came back")
        finally:
            stop.set()
        assert sum(task.result() for task in running) > 0
    for client in (writer, *readers):
        assert client.wait_connected(DEADLINE_S)
    until(lambda: held(writer) == (0, 0), "nothing leaked")
    writer.check()


def store_any(client: object) -> bool:
    """Whether requests have gone through since the last start."""
    return answers(client)  # type: ignore[arg-type]


def test_stopped_server_costs_one_timeout_and_then_nothing(pool: Pool) -> None:
    client = pool.client(lends=4 * MIB, **{"client.request_timeout_ms": 100})
    store(client, [1])
    with pool.stopped():
        started = time.monotonic()
        with pytest.raises(Unavailable):
            client.lookup([key(1)], LAYOUT)
        assert time.monotonic() - started < 1.0
        assert not client.connected
        started = time.perf_counter()
        for _ in range(100):
            with pytest.raises(Unavailable):
                client.reserve([key(2)], layout=LAYOUT, size=SIZE)
        assert time.perf_counter() - started < 0.1
    until(lambda: client.connected, "the probe got an answer")
    assert read(client, [1]) == 1
    until(lambda: held(client) == (0, 0), "the abandoned requests left nothing")


def test_request_under_way_fails_soon_when_the_server_dies(pool: Pool) -> None:
    client = pool.client(**{"client.request_timeout_ms": 60_000})
    failed = threading.Event()

    def ask() -> None:
        with pytest.raises(Unavailable):
            client.lookup([key(1)], LAYOUT)
        failed.set()

    assert pool.server is not None
    with pool.stopped():
        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: client.counters["outstanding"] == 1, "the request is under way")
        pool.kill()
        assert failed.wait(5)
    asking.join()


def test_stopped_server_keeps_what_a_lost_reply_granted_for_a_moment_only(pool: Pool) -> None:
    client = pool.client(lends=4 * MIB, **{"client.request_timeout_ms": 100})
    with pool.stopped():
        for call in range(3):
            with pytest.raises(Unavailable):
                client.reserve_blank(call + 1, layout=LAYOUT, size=SIZE)
    until(lambda: answers(client) and held(client) == (0, 0), "the server took back what nobody heard of")


def test_a_client_that_was_closed_leaves_no_lock_behind(pool: Pool) -> None:
    """Also to a server that ends at once: the answer to Bye says that the session is over."""
    pool.client(lends=MIB).close()
    assert list((pool.path / "sessions").iterdir()) == []
