"""Reservations, leases and pins: who holds what, until when, and what a declaration settles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from metadata_server.directory import Policy
from metadata_server.errors import Refusal
from tests.support.pool import Pool, keys, layout
from vcache import limits, protocol
from vcache.limits import KIB
from vcache.protocol import ErrorCode, Extents, Outcome

ROOM = 8


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    pool = Pool(tmp_path / "extents", segments=(ROOM * 4 * KIB,))
    pool.store(1, *range(4))
    yield pool
    pool.close()


def gauges(pool: Pool) -> tuple[float, float, float]:
    found = pool.directory.gauges()
    return found["reservations"], found["leases"], found["pins"]


def intact(pool: Pool, extents: Extents) -> list[bool]:
    found: list[bool] = pool.reader().unchanged(extents["index"], extents["generation"]).tolist()
    return found


# --- leases -------------------------------------------------------------------------------------------------


def test_a_lease_keeps_chunks_until_its_time_is_up(pool: Pool) -> None:
    held = pool.acquire(1, 0, 1)
    assert len(pool.reserve(2, count=ROOM)) == ROOM - 2
    assert intact(pool, held) == [True, True]
    pool.wait_ms(pool.policy.lease_ms - 1)
    assert pool.reserve(2, count=1).size == 0
    pool.wait_ms(1)
    assert len(pool.reserve(2, count=ROOM)) == 2
    assert intact(pool, held) == [False, False]


def test_a_lease_is_released_early(pool: Pool) -> None:
    pool.acquire(1, 0, 1)
    pool.release(1, pool.rid)
    assert gauges(pool) == (0, 0, 0)
    assert len(pool.reserve(2, count=ROOM)) == ROOM


def test_leases_add_up_and_each_ends_by_itself(pool: Pool) -> None:
    pool.acquire(1, 0, 1)
    first = pool.rid
    pool.wait_ms(1_000)
    pool.acquire(1, 0)
    pool.acquire(2, 0, 0, 1, prefix=False)
    pool.release(1, first)
    pool.release(1, first)
    assert gauges(pool) == (0, 2, 0)
    assert pool.directory.rights.leases.max() == 2
    pool.wait_ms(pool.policy.lease_ms)
    assert gauges(pool) == (0, 0, 0)
    assert pool.directory.rights.leases.max() == 0


def test_ends_of_leases_that_were_released_are_not_kept(pool: Pool) -> None:
    pool.checks = False
    pool.acquire(2, 0)
    for _ in range(5_000):
        pool.acquire(1, 0, 1)
        pool.release(1, pool.rid)
    assert len(pool.directory.rights._lease_ends) < 2_000
    assert gauges(pool) == (0, 1, 0)
    pool.wait_ms(pool.policy.lease_ms)
    assert gauges(pool) == (0, 0, 0)


def test_a_lease_does_not_keep_a_chunk_from_being_removed_but_the_fence_tells(pool: Pool) -> None:
    held = pool.acquire(1, 0, 1)
    pool.remove(0)
    assert intact(pool, held) == [False, True]
    assert len(pool.reserve(2, count=ROOM)) == ROOM - 1
    pool.wait_ms(pool.policy.lease_ms)
    assert len(pool.reserve(2, count=ROOM)) == 1


def test_a_dead_sessions_leases_end(pool: Pool) -> None:
    pool.acquire(2, 0, 1)
    pool.directory.end_session(2)
    pool.check()
    pool.wait_ms(pool.policy.lease_ms)
    assert gauges(pool) == (0, 0, 0)
    pool.directory.end_session(2)


# --- pins ---------------------------------------------------------------------------------------------------


def test_a_pin_has_no_deadline(pool: Pool) -> None:
    held = pool.acquire(1, 0, 1, pin=True)
    pool.wait_ms(100_000_000)
    assert len(pool.reserve(2, count=ROOM)) == ROOM - 2
    assert intact(pool, held) == [True, True]


def test_a_pin_is_released_wholly_or_in_part(pool: Pool) -> None:
    held = pool.acquire(1, 0, 1, 2, pin=True)
    right = pool.rid
    pool.release(1, right, held[:1])
    pool.release(1, right, held[:1])
    assert gauges(pool) == (0, 0, 2)
    pool.release(2, right)
    assert gauges(pool) == (0, 0, 2)
    pool.release(1, right)
    pool.release(1, right)
    assert gauges(pool) == (0, 0, 0)


def test_pins_of_one_chunk_add_up(pool: Pool) -> None:
    rights = []
    for session in (1, 1, 2):
        pool.acquire(session, 0, pin=True)
        rights.append((session, pool.rid))
    pool.remove(0)
    for session, right in rights:
        assert pool.states().get("ORPHANED") == 1
        pool.release(session, right)
    assert "ORPHANED" not in pool.states()


def test_a_dead_sessions_pins_end_and_others_stay(pool: Pool) -> None:
    pool.acquire(1, 0, 1, pin=True)
    pool.acquire(2, 1, 2, pin=True, prefix=False)
    pool.remove(0, 1, 2)
    pool.directory.end_session(1)
    pool.check()
    assert pool.states() == {"COMMITTED": 1, "ORPHANED": 2}
    pool.directory.end_session(2)
    pool.check()
    assert pool.states() == {"COMMITTED": 1}


def test_the_name_of_a_right_is_its_sessions(pool: Pool) -> None:
    pool.acquire(1, 0, pin=True)
    right = pool.rid
    ask = protocol.Acquire(keys(1), layout(1), pin=True)
    pool.directory.handle(2, right, ask, pool.now_ns)
    pool.release(2, right)
    assert pool.directory.rights.sessions[1].pinned_count == 1
    assert pool.directory.rights.sessions[2].pinned_count == 0


def test_one_request_is_granted_one_right(pool: Pool) -> None:
    """Its answer may not be kept any more when it comes again: a second right would never be released."""
    for pin in (False, True):
        pool.acquire(1, 0, 1, pin=pin)
        ask = protocol.Acquire(keys(0, 1), layout(1), pin=pin)
        with pytest.raises(Refusal) as refusal:
            pool.directory.handle(1, pool.rid, ask, pool.now_ns)
        assert refusal.value.code == ErrorCode.STALE
        pool.release(1, pool.rid)
        pool.check()
    assert gauges(pool) == (0, 0, 0)


def test_pins_are_limited_in_bytes_and_what_is_beyond_is_a_miss(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "limited", segments=(ROOM * 4 * KIB,), policy=Policy(pinned_bytes_max=3 * 4 * KIB))
    pool.store(1, 0, 1, 2, 4, 5)
    assert len(pool.acquire(1, 0, 1, pin=True)) == 2
    first = pool.rid
    ask = protocol.Acquire(keys(0, 3, 4, 5), layout(1), pin=True, prefix=False)
    reply = pool.ask(1, ask, protocol.Acquired)
    assert reply.flags == bytes([1, 0, 0, 0])
    assert len(reply.extents) == 32
    assert len(pool.acquire(1, 0, pin=True)) == 0
    assert len(pool.acquire(1, 0, 1, 2)) == 3, "a lease is not limited so"
    assert len(pool.acquire(2, 0, 1, 2, pin=True)) == 3, "each session has its own limit"
    pool.release(1, first)
    assert len(pool.acquire(1, 4, 5, pin=True)) == 2
    pool.close()


def test_rights_are_limited_in_number(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RIGHTS_PER_SESSION_MAX", 3)
    for pin in (True, False, True):
        pool.acquire(1, 0, pin=pin)
    with pytest.raises(Refusal, match="rights"):
        pool.acquire(1, 0)
    assert len(pool.acquire(2, 0)) == 1
    pool.wait_ms(pool.policy.lease_ms)
    assert len(pool.acquire(1, 0)) == 1


def test_reservations_are_limited_in_number(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RESERVATIONS_PER_SESSION_MAX", 3)
    assert len(pool.reserve(1, count=2)) == 2
    with pytest.raises(Refusal, match="may reserve 1 more"):
        pool.reserve(1, count=2)
    with pytest.raises(Refusal, match="may reserve 1 more"):
        pool.reserve(1, 10, 11)
    assert len(pool.reserve(1, 0, 1, 10)) == 1
    assert len(pool.reserve(2, count=2)) == 2


# --- reservations -------------------------------------------------------------------------------------------


def test_a_reservation_has_no_deadline(pool: Pool) -> None:
    extents = pool.reserve(1, count=ROOM)
    pool.wait_ms(1_000_000_000)
    assert len(pool.reserve(2, count=1)) == 0
    assert pool.commit(1, extents, *range(10, 10 + ROOM)) == [Outcome.COMMITTED] * ROOM


def test_a_dead_sessions_reservations_are_free_under_new_generations(pool: Pool) -> None:
    extents = pool.reserve(1, count=ROOM)
    pool.directory.end_session(1)
    pool.check()
    again = pool.reserve(2, count=ROOM)
    assert len(again) == ROOM
    old = dict(zip(extents["index"].tolist(), extents["generation"].tolist(), strict=True))
    assert all(int(each["generation"]) > old[int(each["index"])] for each in again)


# --- declarations -------------------------------------------------------------------------------------------


def test_a_declaration_frees_what_it_does_not_name(pool: Pool) -> None:
    stock = pool.reserve(1, count=3)
    held = pool.acquire(1, 0, 1, pin=True)
    right = pool.rid
    other = pool.acquire(1, 2, pin=True)
    assert pool.declare(1, stock[:1], {right: held[1:]}) == 2 + 1 + len(other)
    assert gauges(pool) == (1, 0, 1)
    assert pool.declare(1, stock[:1], {right: held[1:]}) == 0
    assert pool.commit(1, stock, 10, 11, 12) == [Outcome.COMMITTED, Outcome.STALE, Outcome.STALE]
    assert pool.declare(1) == 1
    assert gauges(pool) == (0, 0, 0)


def test_a_declaration_is_about_requests_up_to_the_one_that_it_names(pool: Pool) -> None:
    pool.reserve(1, count=1)
    before = pool.rid
    pool.reserve(1, count=1)
    pool.acquire(1, 0, pin=True)
    assert pool.declare(1, settled=before) == 1
    assert gauges(pool) == (1, 0, 1)
    assert pool.declare(1) == 2


def test_a_declaration_is_the_senders_only(pool: Pool) -> None:
    extents = pool.reserve(1, count=2)
    held = pool.acquire(1, 0, pin=True)
    assert pool.declare(2, extents, {pool.rid: held}) == 0
    assert gauges(pool) == (2, 0, 1)


def test_a_declaration_of_older_generations_names_nothing(pool: Pool) -> None:
    old = pool.reserve(1, count=ROOM)
    pool.abort(1, old)
    new = pool.reserve(1, count=ROOM)
    mixed = np.concatenate([new[:1], old])
    assert pool.declare(1, mixed) == ROOM - 1
    assert gauges(pool) == (1, 0, 0)


def test_an_older_declaration_does_not_undo_a_newer_one(pool: Pool) -> None:
    pool.reserve(1, count=1)
    pool.declare(1, settled=pool.rid)
    newest = pool.directory.rights.sessions[1].settled
    pool.declare(1, settled=1)
    assert pool.directory.rights.sessions[1].settled == newest


def test_a_declared_orphan_is_freed_when_it_is_not_named_any_more(pool: Pool) -> None:
    held = pool.acquire(1, 0, pin=True)
    right = pool.rid
    pool.remove(0)
    assert pool.declare(1, pins={right: held}) == 0
    assert pool.states()["ORPHANED"] == 1
    assert pool.declare(1) == 1
    assert "ORPHANED" not in pool.states()


def test_declaring_what_one_does_not_have_gives_nothing(pool: Pool) -> None:
    strange = pool.acquire(2, 0, 1)
    assert pool.declare(1, strange, {3: strange, 4: strange}) == 0
    assert gauges(pool)[2] == 0
    assert pool.abort(1, strange) == 0
    pool.release(1, 3)
    assert pool.there(0, 1) == [0, 1]


def test_a_declaration_as_large_as_the_limits_allow_fits_one_frame() -> None:
    per_right = limits.PINNED_EXTENTS_PER_SESSION_MAX // limits.RIGHTS_PER_SESSION_MAX
    pins = [
        protocol.Right((1 << 63) + number, bytes(8 * per_right))
        for number in range(limits.RIGHTS_PER_SESSION_MAX)
    ]
    full = protocol.Declare((1 << 64) - 1, bytes(8 * limits.RESERVATIONS_PER_SESSION_MAX), pins)
    frame = protocol.encode_request(full, rid=1, session=1, token=bytes(16), epoch=1)
    assert len(frame) <= limits.FRAME_BYTES_MAX


# --- after a restart ----------------------------------------------------------------------------------------


def test_pins_of_the_living_hold_until_all_have_said_what_they_have(pool: Pool) -> None:
    held = pool.acquire(1, 0, pin=True)
    mine = pool.rid
    pool.acquire(2, 1, pin=True)
    pool.acquire(3, 2, pin=True)
    pool.restart(1, 2)

    assert len(pool.reserve(4, count=ROOM)) == ROOM - 3
    assert pool.there(0, 1, 2, 3) == [0, 1, 2]
    assert pool.declare(1, pins={mine: held}) == 0
    assert pool.reserve(4, count=1).size == 0, "session 2 has not said anything yet"
    pool.declare(2)
    pool.check()
    assert len(pool.reserve(4, count=ROOM)) == 2
    assert pool.there(0, 1, 2, 3) == [0]
    assert intact(pool, held) == [True]
    pool.release(1, mine)
    assert len(pool.reserve(4, count=ROOM)) == 1


def test_the_death_of_the_last_one_awaited_settles_it_too(pool: Pool) -> None:
    pool.acquire(1, 0, pin=True)
    pool.acquire(2, 1, pin=True)
    pool.restart(1, 2)
    pool.directory.end_session(1)
    assert len(pool.reserve(4, count=ROOM)) == ROOM - 2
    pool.directory.end_session(2)
    pool.check()
    assert len(pool.reserve(4, count=ROOM)) == 2


def test_with_nobody_alive_everything_is_free_at_once(pool: Pool) -> None:
    pool.acquire(1, 0, pin=True)
    pool.reserve(1, count=2)
    pool.remove(0)
    pool.restart()
    assert gauges(pool) == (0, 0, 0)
    assert pool.states() == {"COMMITTED": 3}


def test_an_orphan_is_kept_for_those_who_pinned_it_across_restarts(pool: Pool) -> None:
    held = pool.acquire(1, 0, pin=True)
    mine = pool.rid
    pool.remove(0)
    for _ in range(2):
        pool.restart(1)
        assert pool.states()["ORPHANED"] == 1
        pool.declare(1, pins={mine: held})
        assert pool.there(0) == []
        assert pool.states()["ORPHANED"] == 1
    pool.release(1, mine)
    assert "ORPHANED" not in pool.states()


def test_a_claim_to_anothers_pin_does_not_end_it(pool: Pool) -> None:
    """Session 2 says that it holds what session 1 pinned, and lets go of it before session 1 has said so."""
    held = pool.acquire(1, 0, pin=True)
    mine = pool.rid
    pool.restart(1, 2)
    pool.declare(2, pins={mine: held, mine + 1: held})
    pool.release(2, mine)
    pool.release(2, mine + 1)
    assert len(pool.reserve(4, count=ROOM)) == ROOM - 1
    pool.declare(1, pins={mine: held})
    assert intact(pool, held) == [True]
    assert pool.there(0) == [0]
    pool.release(1, mine)
    assert len(pool.reserve(4, count=ROOM)) == 1


def test_new_pins_on_inherited_chunks_count_as_well(pool: Pool) -> None:
    held = pool.acquire(1, 0, pin=True)
    pool.restart(1, 2)
    again = pool.acquire(2, 0, pin=True)
    right = pool.rid
    pool.remove(0)
    pool.declare(1)
    assert pool.declare(2, pins={right: again}) == 0
    assert pool.states()["ORPHANED"] == 1
    assert intact(pool, held) == [True]
    pool.release(2, right)
    assert "ORPHANED" not in pool.states()


def test_reservations_and_their_requests_are_known_after_a_restart(pool: Pool) -> None:
    stock = pool.reserve(1, count=2)
    before = pool.rid
    later = pool.reserve(1, count=1)
    pool.reserve(2, count=1)
    pool.restart(1)
    assert gauges(pool) == (3, 0, 0), "session 2 is dead"
    assert pool.declare(1, stock[:1], settled=before) == 1
    assert pool.commit(1, np.concatenate([stock, later]), 10, 11, 12) == [
        Outcome.COMMITTED,
        Outcome.STALE,
        Outcome.COMMITTED,
    ]


def test_leases_are_lost_with_the_server_and_the_fence_tells(pool: Pool) -> None:
    held = pool.acquire(1, 0, 1)
    pool.restart(1)
    assert gauges(pool) == (0, 0, 0)
    assert intact(pool, held) == [True, True]
    assert len(pool.reserve(2, count=ROOM)) == ROOM
    assert intact(pool, held) == [False, False]


def test_more_pins_than_the_limit_may_be_inherited_but_no_more_be_had(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "limited", segments=(ROOM * 4 * KIB,))
    pool.store(1, *range(4))
    held = pool.acquire(1, 0, 1, 2, pin=True)
    right = pool.rid
    pool.policy = Policy(pinned_bytes_max=4 * KIB)
    pool.restart(1)
    pool.declare(1, pins={right: held})
    assert len(pool.acquire(1, 3, pin=True)) == 0
    pool.release(1, right)
    assert len(pool.acquire(1, 3, pin=True)) == 1
    pool.close()
