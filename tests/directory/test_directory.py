"""The directory: what each request does, who may do it, what people are shown of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from metadata_server.errors import Refusal
from tests.directory.conftest import ROOM
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
    make,
    namespace,
)
from vcache import limits, protocol
from vcache.limits import KIB, MIB
from vcache.protocol import EXTENT, Outcome

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
