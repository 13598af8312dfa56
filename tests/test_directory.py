"""The directory: what each request does, who may do it, what is given up for whom."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from metadata_server.directory import NS, Policy
from metadata_server.errors import Refusal
from tests.support.pool import (
    DATA_OFFSET,
    SECOND,
    Pool,
    attach,
    handles,
    key,
    keys,
    layout,
    lengths,
    namespace,
)
from vcache import limits, protocol
from vcache.errors import RemoteProtocolError
from vcache.limits import KIB, MIB
from vcache.protocol import EXTENT, ErrorCode, Extents, Outcome
from vcache.table import State

ROOM = 8
"""Extents of 4 KiB that a pool of the fixture holds."""


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    pool = Pool(tmp_path / "extents", segments=(ROOM * 4 * KIB,))
    yield pool
    pool.close()


def make(tmp_path: Path, *sizes: int, policy: Policy | None = None) -> Pool:
    return Pool(tmp_path / "several", segments=sizes, policy=policy)


# --- writing ------------------------------------------------------------------------------------------------


def test_what_is_committed_is_found_and_not_before(pool: Pool) -> None:
    extents = pool.reserve(1, 1, 2, 3)
    assert pool.there(1, 2, 3) == []
    assert pool.commit(1, extents, 1, 2, 3) == [Outcome.COMMITTED] * 3
    assert pool.there(1, 2, 3) == [1, 2, 3]

    found = pool.acquire(2, 1, 2, 3)
    assert found["index"].tolist() == extents["index"].tolist()
    assert found["generation"].tolist() == extents["generation"].tolist()
    assert found["offset"].tolist() == extents["offset"].tolist()
    assert found["length"].tolist() == [4 * KIB] * 3


def test_reserve_tells_what_is_there_and_grants_the_rest_in_order(pool: Pool) -> None:
    pool.store(1, 2, 4)
    ask = protocol.Reserve(layout(1), 4 * KIB, keys(1, 2, 3, 4, 5))
    reply = pool.ask(1, ask, protocol.Reserved)

    assert reply.present == bytes([0, 1, 0, 1, 0])
    assert reply.wanted == 3
    extents = protocol.unpack(reply.extents, EXTENT)
    assert len(extents) == len(set(extents["index"].tolist())) == 3
    assert extents["offset"].min() >= DATA_OFFSET


def test_the_room_of_an_extent_is_whole_pages_and_a_chunk_may_be_shorter(pool: Pool) -> None:
    extents = pool.reserve(1, 1, size=5000)
    assert extents["length"].tolist() == [8 * KIB]
    ask = protocol.Commit(handles(extents), keys(1), lengths(4999), namespace(1))
    pool.ask(1, ask, protocol.Committed)
    assert pool.acquire(1, 1)["length"].tolist() == [4999]


def test_a_stock_is_bound_at_commit(pool: Pool) -> None:
    stock = pool.reserve(1, count=3)
    assert len(stock) == 3
    assert pool.commit(1, stock[:1], 7) == [Outcome.COMMITTED]
    assert pool.there(7) == [7]
    assert pool.abort(1, stock) == 2
    assert pool.states() == {"COMMITTED": 1}


def test_of_two_writers_of_one_key_the_first_wins_and_the_second_keeps_its_extent(pool: Pool) -> None:
    mine, yours = pool.reserve(1, 1), pool.reserve(2, 1)
    assert pool.commit(2, yours, 1) == [Outcome.COMMITTED]
    assert pool.commit(1, mine, 1) == [Outcome.LOST]
    assert pool.acquire(3, 1)["index"].tolist() == yours["index"].tolist()
    assert pool.commit(1, mine, 2) == [Outcome.COMMITTED]
    assert pool.there(1, 2) == [1, 2]


def test_one_key_twice_in_a_commit_is_bound_once(pool: Pool) -> None:
    extents = pool.reserve(1, count=2)
    assert sorted(pool.commit(1, extents, 1, 1)) == [Outcome.COMMITTED, Outcome.LOST]
    assert pool.abort(1, extents) == 1


def test_one_extent_twice_in_a_commit_is_bound_once(pool: Pool) -> None:
    extents = pool.reserve(1, count=1)
    outcomes = pool.commit(1, extents[[0, 0]], 1, 2)
    assert sorted(outcomes) == [Outcome.COMMITTED, Outcome.STALE]
    assert len(pool.there(1, 2)) == 1


def test_only_its_owner_commits_or_aborts_a_reservation_and_only_once(pool: Pool) -> None:
    extents = pool.reserve(1, 1)
    assert pool.commit(2, extents, 1) == [Outcome.STALE]
    assert pool.abort(2, extents) == 0
    assert pool.commit(1, extents, 1) == [Outcome.COMMITTED]
    assert pool.commit(1, extents, 2) == [Outcome.STALE]
    assert pool.abort(1, extents) == 0


@pytest.mark.parametrize("index", [0, 1 << 20, (1 << 32) - 1])
def test_a_handle_that_nobody_was_granted_changes_nothing(index: int, pool: Pool) -> None:
    bad = np.zeros(1, EXTENT)
    bad["index"], bad["generation"], bad["length"] = index, 5, 100
    assert pool.commit(1, bad, 1) == [Outcome.STALE]
    assert pool.abort(1, bad) == 0
    assert pool.declare(1, bad, {1: bad}) == 0
    pool.release(1, 1, bad)


def test_a_late_message_about_an_older_generation_changes_nothing(pool: Pool) -> None:
    old = pool.reserve(1, count=ROOM)
    pool.abort(1, old)
    new = pool.reserve(1, count=ROOM)
    assert sorted(new["index"].tolist()) == sorted(old["index"].tolist())
    assert (new["generation"] > old["generation"].max()).all()
    assert pool.abort(1, old) == 0
    assert pool.commit(1, old, *range(ROOM)) == [Outcome.STALE] * ROOM


def test_a_replica_is_kept_beside_copies_in_other_segments(tmp_path: Path) -> None:
    pool = make(tmp_path, MIB, MIB, MIB)
    first, second, third, again = (pool.reserve(1, count=1, near=near) for near in (1, 2, 3, 2))
    assert pool.commit(1, first, 1) == [Outcome.COMMITTED]
    assert pool.commit(1, second, 1) == [Outcome.LOST]
    assert pool.commit(1, second, 1, replica=True) == [Outcome.COMMITTED]
    assert pool.commit(1, third, 1, replica=True) == [Outcome.COMMITTED]
    assert pool.commit(1, again, 1, replica=True) == [Outcome.LOST]

    assert [pool.acquire(2, 1, near=near)["segment"].tolist() for near in (0, 1, 2, 3, 9)] == [
        [1],
        [1],
        [2],
        [3],
        [1],
    ]
    for number, left in ((1, 2), (2, 1), (3, 0)):
        pool.directory.drop_segment(number)
        pool.check()
        assert len(pool.directory.replicas.get(key(1), [])) == max(0, left - 1)
        assert pool.there(1) == ([1] if left else [])
    pool.close()


def test_replicas_are_removed_together(tmp_path: Path) -> None:
    pool = make(tmp_path, MIB, MIB)
    for near in (1, 2):
        pool.commit(1, pool.reserve(1, count=1, near=near), 1, replica=True)
    assert pool.remove(1) == 1
    assert pool.there(1) == []
    assert "COMMITTED" not in pool.states()
    pool.close()


# --- reading ------------------------------------------------------------------------------------------------


def test_lookup_counts_the_prefix_and_the_bitmap_says_each(pool: Pool) -> None:
    pool.store(1, 1, 2, 4)
    ask = protocol.Lookup(keys(1, 2, 3, 4), layout(1))
    assert pool.ask(1, ask, protocol.Found) == protocol.Found(2)
    assert pool.there(1, 2, 3, 4) == [1, 2, 4]
    assert pool.ask(1, protocol.Lookup(b"", layout(1)), protocol.Found) == protocol.Found(0)
    assert pool.ask(1, protocol.Lookup(b"", layout(1), True), protocol.Found) == protocol.Found(0)


def test_nothing_is_found_under_another_layout_but_contains_says_it_is_there(pool: Pool) -> None:
    pool.store(1, 1, 2)
    assert pool.there(1, 2, form=2) == []
    assert len(pool.acquire(1, 1, 2, form=2)) == 0
    assert len(pool.acquire(1, 1, 2, form=2, prefix=False)) == 0
    found = pool.ask(1, protocol.Contains(keys(2, 3)), protocol.Found)
    assert found == protocol.Found(1, bytes([1, 0]))


def test_a_prefix_ends_where_the_layout_changes(pool: Pool) -> None:
    pool.store(1, 1)
    pool.store(1, 2, form=2)
    pool.store(1, 3)
    assert len(pool.acquire(1, 1, 2, 3)) == 1
    assert len(pool.acquire(1, 1, 2, 3, prefix=False)) == 2


def test_acquire_grants_the_prefix_or_each_key(pool: Pool) -> None:
    extents = pool.store(1, 1, 2, 4)
    assert pool.acquire(1, 1, 2, 3, 4)["index"].tolist() == extents["index"][:2].tolist()
    ask = protocol.Acquire(keys(1, 2, 3, 4), layout(1), prefix=False)
    reply = pool.ask(1, ask, protocol.Acquired)
    assert reply.flags == bytes([1, 1, 0, 1])
    assert protocol.unpack(reply.extents, EXTENT)["index"].tolist() == extents["index"].tolist()
    assert reply.lease_ms == pool.policy.lease_ms


def test_a_miss_grants_nothing_and_holds_nothing(pool: Pool) -> None:
    assert len(pool.acquire(1, 1, 2)) == 0
    assert pool.directory.gauges()["leases"] == 0


# --- room ---------------------------------------------------------------------------------------------------


def test_exactly_as_many_are_given_up_as_are_wanted(pool: Pool) -> None:
    pool.store(1, *range(ROOM))
    assert len(pool.reserve(1, 100, 101, 102)) == 3
    assert pool.directory.counters["evicted"] == 3
    assert len(pool.there(*range(ROOM))) == ROOM - 3
    pool.abort(1, pool.reserve(1, count=2))
    assert pool.directory.counters["evicted"] == 5
    assert len(pool.reserve(1, count=2)) == 2
    assert pool.directory.counters["evicted"] == 5


def test_what_does_not_fit_is_said_and_the_rest_is_granted(pool: Pool) -> None:
    pool.store(1, *range(ROOM))
    held = pool.acquire(2, 0, 1, 2, pin=True)
    stock = pool.reserve(3, count=2)
    reply = pool.ask(1, protocol.Reserve(layout(1), 4 * KIB, keys(*range(100, 110))), protocol.Reserved)

    assert reply.wanted == 10
    assert len(reply.extents) == (ROOM - 3 - 2) * EXTENT.itemsize
    assert pool.there(0, 1, 2) == [0, 1, 2]
    assert len(held) == 3
    assert len(stock) == 2
    assert pool.directory.counters["unfitted"] == 10 - 3


def test_a_chunk_larger_than_the_pool_costs_nobody_his_place(pool: Pool) -> None:
    pool.store(1, *range(ROOM))
    assert len(pool.reserve(1, 100, size=MIB)) == 0
    assert pool.there(*range(ROOM)) == list(range(ROOM))


def test_what_the_same_reserve_found_is_not_given_up_for_it(pool: Pool) -> None:
    pool.store(1, *range(ROOM))
    reply = pool.ask(1, protocol.Reserve(layout(1), 4 * KIB, keys(*range(ROOM + 4))), protocol.Reserved)
    assert reply.present == bytes([1] * ROOM + [0] * 4)
    assert reply.extents == b""
    assert pool.there(*range(ROOM)) == list(range(ROOM))


def test_prefixes_lose_their_tail_first(pool: Pool) -> None:
    pool.store(1, *range(ROOM))
    for left in range(ROOM - 1, 3, -1):
        pool.reserve(1, count=1)
        assert pool.there(*range(ROOM)) == list(range(left))


def test_a_prefix_that_was_used_loses_its_tail_first_too(pool: Pool) -> None:
    pool.store(1, 3, 2, 1, 0)
    pool.release(1, (pool.acquire(1, 0, 1, 2, 3), pool.rid)[1])
    pool.store(1, 10, 11, 12, 13)
    pool.reserve(1, count=1)
    assert pool.there(0, 1, 2, 3) == [0, 1, 2]
    pool.ask(1, protocol.Touch(keys(0, 1, 2)), protocol.Done)
    pool.reserve(1, count=4)
    assert pool.there(0, 1, 2, 10, 11, 12, 13) == [0, 1, 2]
    pool.reserve(1, count=1)
    assert pool.there(0, 1, 2) == [0, 1]


def test_a_prefix_that_grew_loses_its_new_end_first(pool: Pool) -> None:
    """What a reserve found there is more recent than what it then commits."""
    pool.store(1, 0, 1, 2)
    pool.store(1, 0, 1, 2, 3, 4)
    pool.store(1, 0, 1, 2, 3, 4, 5, 6, 7)
    for left in range(ROOM - 1, 3, -1):
        pool.reserve(1, count=1)
        assert pool.there(*range(ROOM)) == list(range(left))


def test_the_head_of_a_prefix_may_have_gone_before_its_end_is_committed(pool: Pool) -> None:
    pool.store(1, 0, 1, 2)
    extents = pool.reserve(1, 0, 1, 2, 3)
    assert pool.remove(0, 1) == 2
    pool.store(1, 5, 6)
    assert pool.commit(1, extents, 3) == [Outcome.COMMITTED]
    assert pool.there(2, 3, 5, 6) == [2, 3, 5, 6]


def test_own_segment_first_then_the_roomiest_peer(tmp_path: Path) -> None:
    pool = make(tmp_path, 4 * 64 * KIB, 8 * 64 * KIB, 16 * 64 * KIB)
    extents = pool.reserve(1, count=4 + 16 + 1, size=64 * KIB, near=1)
    assert extents["segment"].tolist() == [1] * 4 + [3] * 16 + [2]
    assert pool.reserve(1, count=1, size=64 * KIB, near=9)["segment"].tolist() == [2]
    pool.close()


def test_the_coldest_in_the_whole_pool_is_given_up_whosever_segment(tmp_path: Path) -> None:
    pool = make(tmp_path, 4 * KIB, 4 * KIB)
    pool.store(1, 1, near=2)
    pool.store(1, 2, near=1)
    assert pool.reserve(1, 3, near=1)["segment"].tolist() == [2]
    pool.close()


def test_a_new_layout_takes_what_is_coldest_and_no_more(tmp_path: Path) -> None:
    pool = make(tmp_path, MIB)
    pool.store(1, *range(64), size=16 * KIB)
    pool.ask(1, protocol.Touch(keys(*range(48))), protocol.Done)
    pool.store(1, 100, 101, 102, 103, size=32 * KIB, form=2)

    assert pool.there(*range(64)) == list(range(56))
    assert pool.there(100, 101, 102, 103, form=2) == [100, 101, 102, 103]
    pool.close()


def test_a_new_layout_uses_what_is_free_beside_a_stock_of_the_old_one(tmp_path: Path) -> None:
    pool = make(tmp_path, 64 * 64 * KIB)
    stock = pool.reserve(1, count=1, size=16 * KIB)
    assert len(pool.reserve(1, count=1000, size=32 * KIB, form=2)) == 127
    assert pool.abort(1, stock) == 1
    pool.close()


@pytest.mark.parametrize("eviction", ["lru", "s3fifo"])
def test_what_is_reserved_pinned_or_leased_is_never_given_up(eviction: str, tmp_path: Path) -> None:
    pool = make(tmp_path, 16 * 4 * KIB, policy=Policy(eviction=eviction))  # type: ignore[arg-type]
    pool.store(1, *range(12))
    pool.acquire(2, 0, 1, 2, pin=True)
    pool.acquire(2, 3, 4, 5)
    pool.reserve(3, count=4)
    assert len(pool.reserve(1, count=10)) == 6
    assert len(pool.reserve(1, count=1, size=8 * KIB, form=2)) == 0
    assert pool.there(*range(12)) == [0, 1, 2, 3, 4, 5]
    pool.wait_ms(pool.policy.lease_ms)
    assert len(pool.reserve(1, count=10)) == 3
    assert pool.there(*range(12)) == [0, 1, 2]
    pool.close()


# --- forgetting ---------------------------------------------------------------------------------------------


def test_a_removed_chunk_is_free_at_once_or_when_its_last_pin_ends(pool: Pool) -> None:
    pool.store(1, 1, 2)
    pool.acquire(2, 2, pin=True)
    first = pool.rid
    pool.acquire(3, 2, pin=True)
    assert pool.remove(1, 2, 3, 2) == 2
    assert pool.there(1, 2) == []
    assert pool.states() == {"ORPHANED": 1}
    pool.release(2, first)
    assert pool.states() == {"ORPHANED": 1}
    pool.release(3, pool.rid - 2)
    assert pool.states() == {"ORPHANED": 1}, "another rid"
    pool.release(3, first + 1)
    assert pool.states() == {}


def test_a_removed_key_may_be_stored_again_while_its_old_copy_is_still_read(pool: Pool) -> None:
    old = pool.store(1, 1)
    pool.acquire(2, 1, pin=True)
    pin = pool.rid
    pool.remove(1)
    new = pool.store(1, 1)
    assert new["index"].tolist() != old["index"].tolist()
    assert pool.acquire(2, 1)["index"].tolist() == new["index"].tolist()
    pool.release(2, pin)
    assert pool.there(1) == [1]


def test_clear_forgets_all_or_one_model(pool: Pool) -> None:
    pool.commit(1, pool.reserve(1, 1, 2), 1, 2, space=1)
    pool.commit(1, pool.reserve(1, 3), 3, space=2)
    assert pool.ask(1, protocol.Clear(namespace(2)), protocol.Done).count == 1
    assert pool.there(1, 2, 3) == [1, 2]
    assert pool.ask(1, protocol.Clear(namespace(9)), protocol.Done).count == 0
    assert pool.ask(1, protocol.Clear(), protocol.Done).count == 2
    assert pool.there(1, 2, 3) == []
    assert pool.directory.gauges()["used_bytes"] == 0


def test_chunks_expire_by_their_own_time_or_the_default(tmp_path: Path) -> None:
    pool = make(tmp_path, MIB, policy=Policy(default_ttl_ms=1_000))
    extents = pool.reserve(1, count=3)
    pool.commit(1, extents[:1], 1)
    pool.commit(1, extents[1:2], 2, ttl_ms=0)
    pool.commit(1, extents[2:], 3, ttl_ms=3_000)
    pool.wait_ms(999)
    assert pool.there(1, 2, 3) == [1, 2, 3]
    pool.wait_ms(1)
    assert pool.there(1, 2, 3) == [2, 3]
    pool.wait_ms(2_000)
    assert pool.there(1, 2, 3) == [2]
    pool.wait_ms(10_000_000)
    assert pool.there(1, 2, 3) == [2]
    assert pool.directory.counters["expired"] == 2
    pool.close()


def test_an_expired_chunk_that_is_pinned_stays_readable(tmp_path: Path) -> None:
    pool = make(tmp_path, MIB, policy=Policy(default_ttl_ms=1_000))
    pool.store(1, 1)
    pool.acquire(2, 1, pin=True)
    pool.wait_ms(1_000)
    assert pool.there(1) == []
    assert pool.states()["ORPHANED"] == 1
    pool.directory.end_session(2)
    pool.check()
    assert "ORPHANED" not in pool.states()
    pool.close()


def test_expiry_is_for_the_chunk_not_for_its_extent(pool: Pool) -> None:
    pool.commit(1, pool.reserve(1, 1), 1, ttl_ms=1_000)
    pool.remove(1)
    pool.store(1, *range(10, 10 + ROOM))
    pool.wait_ms(2_000)
    assert len(pool.there(*range(10, 10 + ROOM))) == ROOM


def test_expiries_of_chunks_that_have_gone_are_not_kept(tmp_path: Path) -> None:
    pool = make(tmp_path, 64 * KIB, policy=Policy(default_ttl_ms=86_400_000))
    pool.checks = False
    for number in range(5_000):
        pool.store(1, number)
    assert len(pool.directory._expiries) < 2_000
    assert len(pool.there(*range(4_990, 5_000))) == 10
    pool.wait_ms(86_400_000)
    assert len(pool.directory.chunks) == 0
    pool.close()


def test_layouts_that_nobody_uses_are_not_kept(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LAYOUTS_MAX", 16)
    pool.directory._layouts_max = 16
    pool.store(1, 1, 2, form=1)
    for form in range(2, 100):
        pool.abort(1, pool.reserve(1, count=1, form=form))
    assert len(pool.directory._layouts) <= 16
    assert pool.there(1, 2, form=1) == [1, 2]
    assert pool.there(1, 2, form=99) == []


# --- segments -----------------------------------------------------------------------------------------------


def test_a_dropped_segment_takes_its_chunks_reservations_and_pins(tmp_path: Path) -> None:
    pool = make(tmp_path, 4 * KIB * 8, 4 * KIB * 8)
    pool.store(1, 1, 2, near=1)
    pool.store(1, 3, near=2)
    pool.acquire(2, 1, 3, pin=True, prefix=False)
    pin = pool.rid
    pool.acquire(2, 1, 2, 3)
    stock = pool.reserve(3, count=2, near=1)
    pool.directory.drop_segment(1)
    pool.check()

    assert pool.there(1, 2, 3) == [3]
    assert pool.commit(3, stock, 4, 5) == [Outcome.STALE] * 2
    assert pool.directory.rights.sessions[2].pinned_count == 1
    assert pool.reserve(1, count=100)["segment"].tolist() == [2] * 7
    pool.release(2, pin)
    pool.wait_ms(pool.policy.lease_ms)
    assert pool.directory.gauges()["pins"] == pool.directory.gauges()["leases"] == 0
    pool.close()


def test_a_segment_is_recognised_by_its_id_and_incarnation(pool: Pool) -> None:
    again = attach(1, ROOM * 4 * KIB)
    assert pool.directory.add_segment(1, again) == 1
    other = protocol.Attach(1, b"", again.segment_id, 99, "shm:0", again.size, again.data_offset)
    assert pool.directory.add_segment(1, other) == 2
    pool.directory.drop_segment(1)
    assert pool.directory.add_segment(1, again) == 3, "the end of an incarnation is final"
    pool.check()


def test_there_is_a_limit_to_segments(pool: Pool) -> None:
    for number in range(2, limits.SEGMENTS_MAX + 1):
        pool.directory.add_segment(1, attach(number, 4 * KIB))
    with pytest.raises(Refusal, match="segments"):
        pool.directory.add_segment(1, attach(9_999, 4 * KIB))
    pool.directory.drop_segment(7)
    assert pool.directory.add_segment(1, attach(9_999, 4 * KIB)) == limits.SEGMENTS_MAX + 1


# --- for people ---------------------------------------------------------------------------------------------


def test_list_goes_through_all_chunks_page_by_page(pool: Pool) -> None:
    pool.store(1, *range(5))
    pool.acquire(1, 2, pin=True)
    pool.acquire(1, 2, 3, prefix=False)
    pool.now_ns += 2 * SECOND
    rows: list[protocol.ChunkRow] = []
    cursor = 0
    for _ in range(3):
        page = pool.ask(1, protocol.List(cursor, 2), protocol.Listed)
        rows += page.rows
        cursor = page.cursor
    assert cursor == 0
    assert sorted(row.key for row in rows) == [key(number) for number in range(5)]
    by_key = {row.key: row for row in rows}
    row = by_key[key(2)]
    assert (row.pins, row.leases, row.length, row.segment) == (1, 1, 4 * KIB, 1)
    assert (row.layout, row.namespace, row.expires_s) == (layout(1), namespace(1), None)
    assert by_key[key(0)].idle_s == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("cursor", [-1, 1 << 40, (1 << 64) - 1])
def test_a_cursor_of_nobodys_is_a_page_like_another(cursor: int, pool: Pool) -> None:
    pool.store(1, 1)
    page = pool.ask(1, protocol.List(cursor, -5), protocol.Listed)
    assert len(page.rows) <= 1


def test_labels_are_limited(pool: Pool) -> None:
    for number in range(limits.LABELS_MAX):
        pool.directory.labels[number.to_bytes(8, "big")] = "x"
    with pytest.raises(Refusal, match="describe"):
        pool.ask(1, protocol.Describe(b"new", "y"), protocol.Done)
    pool.ask(1, protocol.Describe((0).to_bytes(8, "big"), "z"), protocol.Done)
    with pytest.raises(Refusal, match="describe"):
        pool.ask(1, protocol.Describe((0).to_bytes(8, "big"), "z" * 1_000), protocol.Done)


# --- what is wrong is refused and changes nothing -----------------------------------------------------------

GOOD = {"handles": b"", "keys": b"", "lengths": b"", "namespace": namespace(1)}
REFUSED: dict[str, tuple[protocol.Request, str]] = {
    "no size": (protocol.Reserve(layout(1), 0, b"", 1), ErrorCode.ARGUMENT),
    "negative size": (protocol.Reserve(layout(1), -1, b"", 1), ErrorCode.ARGUMENT),
    "size beyond lengths": (
        protocol.Reserve(layout(1), limits.CHUNK_BYTES_MAX + 1, b"", 1),
        ErrorCode.ARGUMENT,
    ),
    "short layout": (protocol.Reserve(b"x", 4096, b"", 1), ErrorCode.ARGUMENT),
    "negative count": (protocol.Reserve(layout(1), 4096, b"", -1), ErrorCode.LIMIT),
    "too many": (
        protocol.Reserve(layout(1), 4096, b"", limits.RESERVATIONS_PER_SESSION_MAX + 1),
        ErrorCode.LIMIT,
    ),
    "commit without keys": (
        protocol.Commit(**(GOOD | {"handles": bytes(8)})),
        ErrorCode.ARGUMENT,
    ),
    "commit without namespace": (protocol.Commit(**(GOOD | {"namespace": b""})), ErrorCode.ARGUMENT),
    "ttl beyond the clock": (protocol.Commit(**GOOD, ttl_ms=1 << 60), ErrorCode.ARGUMENT),
    "pin twice": (protocol.Acquire(keys(1, 1), layout(1), pin=True), ErrorCode.ARGUMENT),
    "clear half a namespace": (protocol.Clear(b"xyz"), ErrorCode.ARGUMENT),
    "too many keys": (
        protocol.Lookup(bytes(32 * (limits.KEYS_PER_REQUEST_MAX + 1)), layout(1)),
        ErrorCode.LIMIT,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_and_changes_nothing(name: str, pool: Pool) -> None:
    pool.store(1, 1, 2)
    content = pool.table.records.tobytes()
    request, code = REFUSED[name]
    with pytest.raises(Refusal) as refusal:
        pool.ask(1, request, protocol.Done)
    assert refusal.value.code == code
    pool.check()
    assert pool.table.records.tobytes() == content


def test_a_commit_with_one_bad_length_changes_nothing(pool: Pool) -> None:
    extents = pool.reserve(1, count=3)
    for bad in (0, 4 * KIB + 1, 1 << 32, (1 << 64) - 1):
        ask = protocol.Commit(handles(extents), keys(1, 2, 3), lengths(10, bad, 10), namespace(1))
        with pytest.raises(Refusal, match=r"lengths\[1\]"):
            pool.ask(1, ask, protocol.Committed)
        assert pool.there(1, 2, 3) == []
    assert pool.abort(1, extents) == 3


HALF = [
    protocol.Lookup(b"x", layout(1)),
    protocol.Contains(bytes(33)),
    protocol.Acquire(bytes(31), layout(1)),
    protocol.Touch(b"x"),
    protocol.Remove(b"x"),
    protocol.Abort(b"x"),
    protocol.Release(1, bytes(9)),
    protocol.Reserve(layout(1), 4096, b"x"),
    protocol.Commit(b"x", b"", b"", namespace(1)),
    protocol.Commit(b"", b"", b"x", namespace(1)),
    protocol.Declare(0, b"x", []),
    protocol.Declare(0, b"", [protocol.Right(1, b"x")]),
]


@pytest.mark.parametrize("request_", HALF, ids=lambda each: type(each).__name__)
def test_half_a_record_is_malformed_and_changes_nothing(request_: protocol.Request, pool: Pool) -> None:
    pool.store(1, 1)
    pool.acquire(1, 1, pin=True)
    content = pool.table.records.tobytes()
    with pytest.raises(RemoteProtocolError):
        pool.ask(1, request_, protocol.Done)
    pool.check()
    assert pool.table.records.tobytes() == content


def test_the_largest_chunk_there_can_be_is_stored(tmp_path: Path) -> None:
    pool = make(tmp_path, 8 << 30)
    assert len(pool.store(1, 1, size=limits.CHUNK_BYTES_MAX)) == 1
    assert pool.acquire(1, 1)["length"].tolist() == [limits.CHUNK_BYTES_MAX]
    pool.close()


def test_a_full_table_grants_what_it_can(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "small", capacity=10, segments=(MIB,))
    assert len(pool.store(1, *range(20))) == 10
    assert len(pool.store(1, *range(20, 25), size=8 * KIB, form=2)) == 5
    assert pool.directory.gauges()["table_full"] > 0
    pool.close()


def test_the_clock_may_be_old(tmp_path: Path) -> None:
    """After 70 years of uptime lengths, uses and expiries still fit their fields."""
    pool = make(tmp_path, MIB, policy=Policy(default_ttl_ms=1_000))
    pool.now_ns = 70 * 365 * 86_400 * NS
    extents = pool.reserve(1, count=1)
    assert pool.commit(1, extents, 1, ttl_ms=limits.TTL_MS_MAX) == [Outcome.COMMITTED]
    assert pool.there(1) == [1]
    assert pool.table.state(int(extents["index"][0])) is State.COMMITTED
    pool.close()


def test_numbers_in_replies_are_those_of_the_table(pool: Pool) -> None:
    extents: Extents = pool.reserve(1, count=ROOM)
    for each in extents:
        index = int(each["index"])
        assert int(each["generation"]) == pool.table.generation(index)
        assert int(each["offset"]) == int(pool.table.offset[index])
        assert int(each["segment"]) == 1
    assert extents["reserved"].tolist() == [0] * ROOM
