"""The directory's room: what is given up for whom, what is forgotten, what expires."""

from __future__ import annotations

from pathlib import Path

import pytest

from metadata_server.directory import Policy
from tests.directory.conftest import ROOM
from tests.support.pool import Pool, keys, layout, make, namespace
from vcache import limits, protocol
from vcache.limits import KIB, MIB
from vcache.protocol import EXTENT, Outcome

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
