"""Chunks that are copied before they are evicted: what is offered, to whom, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from metadata_server.directory import Policy
from metadata_server.errors import Refusal
from tests.support.pool import Pool, attach, handles, key, keys, layout
from vcache import protocol
from vcache.limits import KIB, OFFER_S
from vcache.protocol import EXTENT, Extents

HOLDER, OTHER, ENGINE, READER = 1, 2, 3, 4
LATE_MS = int(OFFER_S * 1000) + 200
CHUNK = 4 * KIB


class Move(NamedTuple):
    """An offer that was taken."""

    session: int
    right: int
    source: Extents
    target: Extents
    key: bytes
    ttl_ms: int


@pytest.fixture(params=["lru", "s3fifo"])
def pool(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pool]:
    """Room for four chunks in rank 0 and eight under it, each lent by a session that copies nothing yet."""
    pool = Pool(tmp_path / "table", policy=Policy(eviction=request.param))
    pool.directory.add_segment(HOLDER, attach(1, 4 * CHUNK))
    pool.directory.add_segment(OTHER, attach(2, 8 * CHUNK, rank=1))
    yield pool
    pool.close()


@pytest.fixture
def flat(tmp_path: Path) -> Iterator[Pool]:
    """Room for four chunks, and nothing under it."""
    pool = Pool(tmp_path / "table")
    pool.directory.add_segment(HOLDER, attach(1, 4 * CHUNK))
    yield pool
    pool.close()


def offers(pool: Pool, session: int, *, below: bool = False, limit: int = 16) -> list[Move]:
    """Take what is offered to a session."""
    reply = pool.ask(session, protocol.Offers(below, limit), protocol.Offered)
    sources, targets = (protocol.unpack(packed, EXTENT) for packed in (reply.sources, reply.targets))
    ttls_ms = np.frombuffer(reply.ttls_ms, "<i8").tolist()
    return [
        Move(session, pool.rid, sources[at : at + 1], targets[at : at + 1], each, ttls_ms[at])
        for at, each in enumerate(protocol.split_keys(reply.keys))
    ]


def moved(pool: Pool, move: Move, *, done: bool = True) -> bool:
    """End a copy; whether it counts."""
    ask = protocol.Moved(move.right, handles(move.source), handles(move.target), done)
    return bool(pool.ask(move.session, ask, protocol.Done).count)


def patient(pool: Pool, *numbers: int) -> tuple[Extents, int]:
    """What a store that waits is granted, and how much is coming."""
    ask = protocol.Reserve(layout(1), CHUNK, keys(*numbers), patient=True)
    reply = pool.ask(ENGINE, ask, protocol.Reserved)
    return protocol.unpack(reply.extents, EXTENT), reply.coming


def ranks(pool: Pool, number: int) -> list[int]:
    """The ranks in which a chunk lies."""
    first = pool.directory.chunks.get(key(number))
    found = [] if first is None else [first, *pool.directory.replicas.get(key(number), ())]
    return [pool.directory.allocator.rank_of(index) for index in found]


def counted(pool: Pool, name: str) -> int:
    return pool.directory.counters[name]


def test_what_has_to_go_is_copied_down_and_then_its_room_is_given_away(pool: Pool) -> None:
    assert offers(pool, HOLDER) == []
    pool.store(ENGINE, 1, 2, 3, 4)
    assert ranks(pool, 1) == [0]
    granted, coming = patient(pool, 5, 6)
    assert len(granted) == 0 and coming == 2
    assert HOLDER in pool.directory.called
    first, second, *_ = offers(pool, HOLDER)
    assert (first.key, second.key) == (key(4), key(3)), "a prefix goes tail first"
    granted, coming = patient(pool, 5, 6)
    assert len(granted) == 0 and coming == 2, "it was given away under the copy"
    assert moved(pool, first) and moved(pool, second)
    granted, coming = patient(pool, 5, 6)
    assert len(granted) == 2 and not coming
    pool.commit(ENGINE, granted, 5, 6)
    assert ranks(pool, 3) == ranks(pool, 4) == [1]
    assert ranks(pool, 5) == [0]
    assert pool.there(1, 2, 3, 4, 5, 6) == [1, 2, 3, 4, 5, 6]
    assert counted(pool, "evicted_unsaved") == 0


def test_what_is_nearly_full_is_copied_ahead(pool: Pool) -> None:
    offers(pool, HOLDER)
    pool.store(ENGINE, 1, 2)
    pool.store(ENGINE, 3, 4)
    assert [moved(pool, move) for move in offers(pool, HOLDER)] == [True, True]
    granted, coming = patient(pool, 5, 6)
    assert len(granted) == 2 and not coming


def test_who_is_not_patient_gets_room_at_once_and_that_is_counted(pool: Pool) -> None:
    offers(pool, HOLDER)
    pool.store(ENGINE, 1, 2, 3, 4)
    assert len(pool.store(ENGINE, 5, 6)) == 2
    assert counted(pool, "evicted_unsaved") == 2


def test_a_chunk_that_is_being_copied_stays_whoever_needs_room(pool: Pool) -> None:
    offers(pool, HOLDER)
    pool.store(ENGINE, 1, 2, 3, 4)
    patient(pool, 5)
    (move, *_) = offers(pool, HOLDER, limit=1)
    assert len(pool.reserve(ENGINE, 5, 6, 7, 8, 9)) >= 3
    assert move.key in pool.directory.chunks
    assert moved(pool, move)


def test_a_chunk_that_was_removed_meanwhile_does_not_come_back(pool: Pool) -> None:
    offers(pool, HOLDER)
    pool.store(ENGINE, 1, 2, 3, 4)
    patient(pool, 5)
    (move,) = offers(pool, HOLDER, limit=1)
    assert pool.remove(4) == 1
    assert not moved(pool, move)
    assert pool.there(4) == []
    assert not moved(pool, move), "twice"


def test_a_copy_that_failed_leaves_the_chunk_where_it_is(pool: Pool) -> None:
    offers(pool, HOLDER)
    pool.store(ENGINE, 1, 2, 3, 4)
    patient(pool, 5)
    (move,) = offers(pool, HOLDER, limit=1)
    assert not moved(pool, move, done=False)
    assert ranks(pool, 4) == [0]
    granted, coming = patient(pool, 5)
    assert len(granted) == 1 and not coming
    assert counted(pool, "evicted_unsaved") == 1


def test_the_copy_keeps_age_namespace_and_layout(pool: Pool) -> None:
    offers(pool, HOLDER)
    extents = pool.reserve(ENGINE, 1, 2, 3, 4, form=7)
    pool.commit(ENGINE, extents, 1, 2, 3, 4, ttl_ms=60_000, space=9)
    ask = protocol.Reserve(layout(1), CHUNK, keys(5), patient=True)
    pool.ask(ENGINE, ask, protocol.Reserved)
    (move,) = offers(pool, HOLDER, limit=1)
    assert 59_000 < move.ttl_ms <= 61_000
    assert moved(pool, move)
    granted, _ = patient(pool, 5)
    pool.commit(ENGINE, granted, 5)
    rows = pool.ask(READER, protocol.List(0, 100), protocol.Listed).rows
    (row,) = [row for row in rows if row.key == key(4)]
    assert (row.layout, row.namespace, row.segment) == (layout(7), (9).to_bytes(8, "big"), 2)
    pool.wait_ms(61_000)
    assert pool.there(4, form=7) == []


def test_a_dead_copier_ends_its_copies_and_another_try_comes(flat: Pool) -> None:
    offers(flat, ENGINE, below=True)
    flat.store(ENGINE, 1, 2, 3, 4)
    patient(flat, 5)
    (move, *_) = offers(flat, ENGINE, below=True)
    flat.directory.end_session(ENGINE)
    offers(flat, READER, below=True)
    flat.wait_ms(200)
    ask = protocol.Reserve(layout(1), CHUNK, keys(5), patient=True)
    assert flat.ask(READER, ask, protocol.Reserved).coming == 1
    (again,) = offers(flat, READER, below=True)
    assert again.key == move.key and moved(flat, again)
    assert len(flat.ask(READER, ask, protocol.Reserved).extents) == EXTENT.itemsize


def test_nobody_is_waited_for_longer_than_an_offer_lasts(flat: Pool) -> None:
    offers(flat, ENGINE, below=True)
    flat.store(ENGINE, 1, 2, 3, 4)
    assert patient(flat, 5)[1] == 1
    flat.wait_ms(LATE_MS)
    granted, coming = patient(flat, 5)
    assert len(granted) == 1 and not coming
    assert counted(flat, "evicted_unsaved") == 1


def test_a_copier_that_hangs_keeps_its_chunk_and_nobody_waits_for_it(flat: Pool) -> None:
    offers(flat, ENGINE, below=True)
    flat.store(ENGINE, 1, 2, 3, 4)
    patient(flat, 5)
    (move,) = offers(flat, ENGINE, below=True)
    flat.wait_ms(LATE_MS)
    assert patient(flat, 5)[1] == 1, "the next one"
    flat.wait_ms(LATE_MS)
    assert len(patient(flat, 5)[0]) == 1
    assert move.key in flat.directory.chunks
    assert moved(flat, move)


@pytest.mark.parametrize("below", [False, True])
def test_a_copier_that_is_stopped_is_waited_for_once_until_it_asks_again(pool: Pool, below: bool) -> None:
    copier = READER if below else HOLDER
    offers(pool, copier, below=below)
    pool.store(ENGINE, 1, 2, 3, 4, *(range(5, 13) if below else ()))
    while not patient(pool, 20, 21)[1]:
        pool.store(ENGINE, pool.rid + 100)
    pool.directory.called.clear()
    pool.wait_ms(LATE_MS)
    assert copier in pool.directory.called, "a notice wakes it when it goes on"
    for number in range(30, 34):
        granted, coming = patient(pool, number)
        assert len(granted) == 1 and not coming
        pool.commit(ENGINE, granted, number)
    pool.wait_ms(LATE_MS)
    offers(pool, copier, below=below)
    assert patient(pool, 40, 41, 42)[1]


def test_who_copies_all_the_time_is_not_set_aside(flat: Pool) -> None:
    offers(flat, READER, below=True)
    flat.store(ENGINE, 1, 2, 3, 4)
    assert patient(flat, 5, 6, 7)[1] == 3
    flat.wait_ms(LATE_MS - 400)
    (move,) = offers(flat, READER, below=True, limit=1)
    flat.wait_ms(400)
    assert moved(flat, move)
    flat.store(ENGINE, 8)
    assert patient(flat, 9, 10, 11, 12)[1]


def test_without_anybody_who_copies_nothing_is_waited_for_or_counted(pool: Pool) -> None:
    pool.store(ENGINE, 1, 2, 3, 4)
    assert len(patient(pool, *range(5, 13))[0]) == 8
    assert ranks(pool, 1) == [0]
    assert counted(pool, "evicted_unsaved") == 0 and not pool.directory.called


@pytest.mark.parametrize("saving", [False, True])
def test_a_new_size_displaces_what_is_colder_also_for_who_waits(flat: Pool, saving: bool) -> None:
    if saving:
        offers(flat, READER, below=True)
    flat.store(ENGINE, 1, 2, 3, 4)
    for number in (5, 6):
        ask = protocol.Reserve(layout(2), 2 * CHUNK, keys(number), patient=True)
        reply = flat.ask(ENGINE, ask, protocol.Reserved)
        assert reply.coming == (2 if saving else 0), "a slab goes when all that is in it was copied"
        if saving:
            assert all(moved(flat, move) for move in offers(flat, READER, below=True))
            reply = flat.ask(ENGINE, ask, protocol.Reserved)
        flat.commit(ENGINE, protocol.unpack(reply.extents, EXTENT), number)
    assert [key(number) in flat.directory.chunks for number in range(1, 7)] == [False] * 4 + [True] * 2
    assert counted(flat, "evicted_unsaved") == 0


def test_what_was_written_below_goes_at_once(flat: Pool) -> None:
    offers(flat, ENGINE, below=True)
    flat.store(ENGINE, 1, 2, 3, 4)
    assert patient(flat, 5, 6)[1] == 2
    moves = offers(flat, ENGINE, below=True)
    assert all(len(move.target) == 0 for move in moves)
    assert [moved(flat, move) for move in moves] == [True, True]
    assert len(patient(flat, 5, 6)[0]) == 2
    assert flat.there(1, 2, 3, 4) == [1, 2]
    assert counted(flat, "evicted_unsaved") == 0


def test_who_withdraws_is_offered_nothing_any_more(flat: Pool) -> None:
    offers(flat, ENGINE, below=True)
    flat.store(ENGINE, 1, 2, 3, 4)
    assert offers(flat, ENGINE, below=True, limit=0) == []
    assert len(patient(flat, 5)[0]) == 1
    assert counted(flat, "evicted_unsaved") == 1, "it was to be written, and there is nobody left who would"


def test_what_leaves_the_last_rank_is_written_below(pool: Pool) -> None:
    """The pool evicts in two steps: from rank 0 to rank 1, from there to the lower tiers."""
    offers(pool, HOLDER)
    offers(pool, OTHER)
    offers(pool, ENGINE, below=True)
    below: set[bytes] = set()
    for number in range(1, 21):
        for _ in range(10):
            granted, coming = patient(pool, number)
            if not coming:
                break
            for move in (*offers(pool, ENGINE, below=True), *offers(pool, HOLDER)):
                assert moved(pool, move)
                below |= set() if len(move.target) else {move.key}
        pool.commit(ENGINE, granted, number)
    there = set(pool.directory.chunks)
    assert there | below == set(map(key, range(1, 21)))
    assert counted(pool, "evicted_unsaved") == 0


def test_what_is_used_below_comes_back_up_and_its_copy_stays(pool: Pool) -> None:
    offers(pool, HOLDER)
    pool.store(ENGINE, 1, 2, 3, 4)
    patient(pool, 5)
    (move,) = offers(pool, HOLDER, limit=1)
    moved(pool, move)
    pool.commit(ENGINE, patient(pool, 5)[0], 5)
    assert ranks(pool, 4) == [1]
    pool.remove(1)
    assert len(pool.acquire(READER, 4, near=1)) == 1
    promoted = [move for move in offers(pool, HOLDER) if move.key == key(4)]
    assert len(promoted) == 1 and int(promoted[0].target["segment"][0]) == 1
    assert moved(pool, promoted[0])
    assert sorted(ranks(pool, 4)) == [0, 1]
    assert int(pool.acquire(READER, 4)["segment"][0]) == 1, "readers find the lowest rank"


def test_what_is_up_already_is_not_offered_up_again_to_who_is_near_its_copy(pool: Pool) -> None:
    offers(pool, HOLDER)
    pool.store(ENGINE, 1, 2, 3, 4)
    patient(pool, 5)
    (move,) = offers(pool, HOLDER, limit=1)
    assert moved(pool, move)
    down = int(move.target["segment"][0])
    pool.directory.called.clear()
    acquire = protocol.Acquire(move.key, layout(1), near=down)
    extents = protocol.unpack(pool.ask(READER, acquire, protocol.Acquired).extents, EXTENT)
    assert extents["segment"].tolist() == [down]
    assert not pool.directory.called and offers(pool, HOLDER) == []


def test_no_source_is_given_up_for_a_target_of_the_same_request(pool: Pool) -> None:
    """Else its copier reads an extent that another copy of its is written to."""
    offers(pool, HOLDER)
    pool.store(ENGINE, 10, size=2 * CHUNK, form=2)
    patient(pool, 1, 2, 3, 4)
    (down,) = offers(pool, HOLDER)
    assert moved(pool, down)
    granted, _ = patient(pool, 1, 2, 3, 4)
    pool.commit(ENGINE, granted, 1, 2, 3, 4)
    patient(pool, 5, 6, 7, 8)  # all four are offered down
    pool.acquire(READER, 10, form=2)  # and this one up, which needs room of another size
    moves = offers(pool, HOLDER)
    assert sorted(move.key for move in moves) == [key(1), key(2), key(3), key(4)]
    assert pool.there(1, 2, 3, 4) == [1, 2, 3, 4]
    assert all(moved(pool, move) for move in moves)
    assert pool.there(1, 2, 3, 4) == [1, 2, 3, 4] and pool.there(10, form=2) == [10]


def test_two_replicas_do_not_go_at_once(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "table", segments=(2 * CHUNK, 2 * CHUNK))
    for segment in pool.segments:
        ask = protocol.Reserve(layout(1), CHUNK, count=2, near=segment)
        extents = protocol.unpack(pool.ask(ENGINE, ask, protocol.Reserved).extents, EXTENT)
        assert set(pool.commit(ENGINE, extents, 1, 2, replica=True)) == {protocol.Outcome.COMMITTED}
    offers(pool, READER, below=True)
    granted, _ = patient(pool, 3, 4, 5, 6)
    while not len(granted):
        assert all(moved(pool, move) for move in offers(pool, READER, below=True))
        granted, _ = patient(pool, 3, 4, 5, 6)
    assert counted(pool, "evicted_unsaved") == 0
    pool.close()


def test_a_copy_outlives_the_server(pool: Pool) -> None:
    offers(pool, HOLDER)
    pool.store(ENGINE, 1, 2, 3, 4)
    patient(pool, 5)
    (move,) = offers(pool, HOLDER, limit=1)
    pool.restart(HOLDER, OTHER, ENGINE)
    pool.declare(HOLDER, move.target, {move.right: move.source}, settled=move.right)
    assert moved(pool, move)
    assert sorted(ranks(pool, 4)) == [0, 1]
    for session in (OTHER, ENGINE):
        pool.declare(session)
    assert pool.states() == {"COMMITTED": 5}


def test_what_a_lost_answer_granted_comes_back(pool: Pool) -> None:
    offers(pool, HOLDER)
    pool.store(ENGINE, 1, 2, 3, 4)
    patient(pool, 5)
    assert len(offers(pool, HOLDER, limit=1)) == 1
    assert pool.declare(HOLDER) == 2, "one reservation and one pin"
    pool.wait_ms(200)
    assert patient(pool, 5)[1] == 1
    assert len(offers(pool, HOLDER, limit=1)) == 1


@pytest.mark.parametrize("gone", [1, 2])
def test_a_segment_that_ends_under_a_copy(pool: Pool, gone: int) -> None:
    offers(pool, HOLDER)
    pool.store(ENGINE, 1, 2, 3, 4)
    patient(pool, 5)
    (move,) = offers(pool, HOLDER, limit=1)
    pool.directory.drop_segment(gone)
    pool.check()
    assert not moved(pool, move)
    pool.check()


def test_a_full_rank_below_that_is_held_gives_up(pool: Pool) -> None:
    """Rank 1 is full of what somebody has pinned: what has to go from rank 0 goes."""
    offers(pool, HOLDER)
    blank = protocol.Reserve(layout(1), CHUNK, count=8)
    pool.directory.allocator.rooms[1].rank = 2  # so that the reservation takes all of the other segment
    held = protocol.unpack(pool.ask(OTHER, blank, protocol.Reserved).extents, EXTENT)
    pool.directory.allocator.rooms[1].rank = 0
    assert set(held["segment"].tolist()) == {2}
    pool.store(ENGINE, 1, 2, 3, 4)
    assert patient(pool, 5)[1] == 1
    assert offers(pool, HOLDER) == []
    assert len(patient(pool, 5)[0]) == 1


def test_a_moved_that_makes_no_sense_is_refused(pool: Pool) -> None:
    with pytest.raises(Refusal, match="one source"):
        pool.ask(HOLDER, protocol.Moved(1, b"", b"", True), protocol.Done)
    stranger = protocol.Moved(99, protocol.pack_handles([0], [0]), b"", True)
    assert pool.ask(HOLDER, stranger, protocol.Done).count == 0


@pytest.mark.parametrize("restarted", [False, True])
def test_what_goes_down_stays_on_its_numa_node(tmp_path: Path, restarted: bool) -> None:
    pool = Pool(tmp_path / "table")
    pool.directory.add_segment(HOLDER, attach(1, 2 * CHUNK, numa=1))
    pool.directory.add_segment(OTHER, attach(2, 64 * CHUNK, rank=1, numa=0))
    pool.directory.add_segment(OTHER, attach(3, 8 * CHUNK, rank=1, numa=1))
    if restarted:
        pool.restart(HOLDER, OTHER, ENGINE)
    offers(pool, HOLDER)
    pool.store(ENGINE, 1, 2)
    patient(pool, 3, 4)
    assert {int(move.target["segment"][0]) for move in offers(pool, HOLDER)} == {3}
    pool.close()
