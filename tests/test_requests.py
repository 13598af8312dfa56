"""Request frames: who may ask, what was asked before, and what a failure of our own ends in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metadata_server.directory import Directory
from tests.support.frames import EPOCH, Server, envelope, store
from tests.support.pool import handles, key, keys, layout, lengths, namespace
from vcache import limits, protocol
from vcache.limits import KIB, TOKEN_BYTES
from vcache.protocol import EXTENT, ErrorCode, Request


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "extents")
    yield server
    server.close()


# --- what is answered ---------------------------------------------------------------------------------------


def test_a_request_is_answered_under_its_rid(server: Server) -> None:
    assert server.ask(protocol.Ping(), 5, protocol.Pong).pid == os.getpid()
    assert server.ask(protocol.Stats(), 6, protocol.Statistics).counters == {"x": 1.0}
    assert server.ask(protocol.Check(), 7, protocol.Done).count == 0
    assert server.ask(protocol.Describe(b"x", "name"), 8, protocol.Done).count == 0
    store(server, 1, 2, first_rid=9)
    assert server.ask(protocol.Lookup(keys(1, 2, 3), layout(1)), 11, protocol.Found).prefix == 2
    assert server.ask(protocol.Touch(keys(1, 2, 3)), 12, protocol.Done).count == 2
    assert len(server.ask(protocol.List(), 13, protocol.Listed).rows) == 2
    assert server.requests.answered == 9
    assert server.requests.refused == 0


def test_release_is_not_answered(server: Server) -> None:
    store(server, 1)
    server.ask(protocol.Acquire(keys(1), layout(1)), 3, protocol.Acquired)
    assert server.send(server.frame(protocol.Release(3), 4)) is None
    assert server.pool.directory.gauges()["leases"] == 0


def test_shutdown_is_passed_on(server: Server) -> None:
    server.ask(protocol.Shutdown(), 1, protocol.Done)
    assert server.ended == 1


# --- who may ask --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"version": protocol.PROTOCOL_VERSION + 1}, ErrorCode.VERSION),
        ({"version": 0}, ErrorCode.VERSION),
        ({"version": protocol.PROTOCOL_VERSION - 1, "epoch": 1, "token": b""}, ErrorCode.VERSION),
        ({"epoch": EPOCH - 1}, ErrorCode.EPOCH),
        ({"epoch": 0, "token": b"x"}, ErrorCode.EPOCH),
        ({"token": bytes(TOKEN_BYTES)}, ErrorCode.TOKEN),
        ({"token": b""}, ErrorCode.TOKEN),
        ({"token": (2).to_bytes(TOKEN_BYTES, "big")}, ErrorCode.TOKEN),
        ({"session": 2}, ErrorCode.TOKEN),
        ({"session": 3}, ErrorCode.TOKEN),
        ({"session": -1}, ErrorCode.TOKEN),
        ({"session": (1 << 64) - 1}, ErrorCode.TOKEN),
        ({"rid": 0}, ErrorCode.STALE),
        ({"rid": -5}, ErrorCode.STALE),
    ],
)
def test_who_is_not_who_he_says_is_refused(changed: dict[str, object], code: str, server: Server) -> None:
    store(server, 1, 2)
    before = server.content()
    rid = int(str(changed.get("rid", 9)))
    server.refused(server.send(envelope(server, **changed)), rid, code)
    assert server.content() == before
    assert set(server.pool.directory.rights.sessions) == {1, 2}
    server.ask(protocol.Clear(), 10, protocol.Done)


def test_a_version_error_says_both_versions(server: Server) -> None:
    message = server.refused(server.send(envelope(server, version=9)), 9, ErrorCode.VERSION)
    assert "version 9" in message
    assert f"speaks {protocol.PROTOCOL_VERSION}" in message


def test_a_server_that_lost_its_directory_grants_nothing(server: Server) -> None:
    server.requests.usurped = True
    server.refused(server.send(server.frame(protocol.Ping(), 1)), 1, ErrorCode.GONE)


def test_a_server_whose_lock_was_taken_gives_no_room_and_then_nothing(server: Server) -> None:
    store(server, 1)
    server.ours = False
    server.ask(protocol.Lookup(keys(1), layout(1)), 3, protocol.Found)
    reserve = protocol.Reserve(layout(1), 4 * KIB, b"", 1)
    server.refused(server.send(server.frame(reserve, 4)), 4, ErrorCode.GONE)
    server.refused(server.send(server.frame(protocol.Ping(), 5)), 5, ErrorCode.GONE)


def test_a_draining_server_reserves_nothing_but_takes_what_is_committed(server: Server) -> None:
    reply = server.ask(protocol.Reserve(layout(1), 4 * KIB, keys(1)), 1, protocol.Reserved)
    server.requests.draining = True
    reserve = protocol.Reserve(layout(1), 4 * KIB, keys(2))
    server.refused(server.send(server.frame(reserve, 2)), 2, ErrorCode.DRAINING)
    extents = protocol.unpack(reply.extents, EXTENT)
    commit = protocol.Commit(handles(extents), keys(1), lengths(10), namespace(1))
    assert server.ask(commit, 3, protocol.Committed).outcomes == b"\0"
    assert server.ask(protocol.Lookup(keys(1), layout(1)), 4, protocol.Found).prefix == 1


# --- what was asked before ----------------------------------------------------------------------------------


def test_a_request_that_comes_again_gets_the_same_answer_and_is_carried_out_once(server: Server) -> None:
    frames = {}
    reserve = server.frame(protocol.Reserve(layout(1), 4 * KIB, keys(1, 2)), 1)
    frames[reserve] = server.send(reserve)
    extents = protocol.unpack(server.read(frames[reserve], 1, protocol.Reserved).extents, EXTENT)
    sizes = lengths(10, 20)
    for rid, request in enumerate(
        (
            protocol.Commit(handles(extents), keys(1, 2), sizes, namespace(1)),
            protocol.Acquire(keys(1, 2), layout(1), pin=True),
            protocol.Acquire(keys(1, 2), layout(1)),
            protocol.Remove(keys(1)),
            protocol.Clear(),
        ),
        start=2,
    ):
        frame = server.frame(request, rid)
        frames[frame] = server.send(frame)
    before = server.content()
    gauges = server.pool.directory.gauges()

    for frame, answer in frames.items():
        assert answer is not None
        assert server.send(frame) == answer
    assert server.content() == before
    assert server.pool.directory.gauges() == gauges


def test_rids_are_a_sessions_own(server: Server) -> None:
    reserve = protocol.Reserve(layout(1), 4 * KIB, b"", 1)
    first = server.ask(reserve, 1, protocol.Reserved, session=1)
    second = server.ask(reserve, 1, protocol.Reserved, session=2)
    assert first.extents != second.extents


def test_replies_are_kept_up_to_a_number_and_a_size(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REPLAYS_PER_SESSION", 3)
    frames = [server.frame(protocol.Reserve(layout(1), 4 * KIB, b"", 1), rid) for rid in range(1, 6)]
    answers = [server.send(frame) for frame in frames]
    assert [server.send(frame) for frame in frames[2:]] == answers[2:]
    replays = server.requests.sessions[1].replays
    assert list(replays.frames) == [3, 4, 5]
    limit = replays.nbytes + 100
    monkeypatch.setattr(limits, "REPLAY_BYTES_PER_SESSION_MAX", limit)
    server.send(server.frame(protocol.Reserve(layout(1), 4 * KIB, keys(*range(100, 200))), 6))
    assert replays.nbytes == sum(map(len, replays.frames.values())) <= limit
    assert list(replays.frames)[-1] == 6
    server.send(server.frame(protocol.Reserve(layout(1), 4 * KIB, keys(*range(1_000))), 7))
    assert replays.nbytes == len(replays.frames) == 0, "an answer larger than the limit is not kept"


def test_a_pin_whose_answer_is_not_kept_any_more_is_not_granted_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REPLAYS_PER_SESSION", 1)
    store(server, 1, 2)
    for rid, pin in ((3, True), (4, False)):
        frame = server.frame(protocol.Acquire(keys(1, 2), layout(1), pin), rid)
        server.send(frame)
        server.ask(protocol.Remove(keys(99)), rid + 10, protocol.Done)
        server.refused(server.send(frame), rid, ErrorCode.STALE)
    assert server.pool.directory.gauges()["pins"] == 2
    server.send(server.frame(protocol.Release(3), 20))
    server.send(server.frame(protocol.Release(4), 21))
    assert server.pool.directory.gauges()["pins"] == server.pool.directory.gauges()["leases"] == 0


def test_what_was_settled_is_stale_however_late_it_comes(server: Server) -> None:
    store(server, 1)
    late: list[tuple[int, Request]] = [
        (5, protocol.Reserve(layout(1), 4 * KIB, b"", 1)),
        (6, protocol.Acquire(keys(1), layout(1), pin=True)),
        (7, protocol.Commit(b"", b"", b"", namespace(1))),
        (8, protocol.Abort(b"")),
        (9, protocol.Remove(keys(1))),
        (10, protocol.Clear()),
    ]
    server.ask(protocol.Declare(10, b"", []), 11, protocol.Done)
    before = server.content()
    for rid, request in late:
        message = server.refused(server.send(server.frame(request, rid)), rid, ErrorCode.STALE)
        assert "declared 10" in message
    assert server.content() == before
    assert server.pool.directory.gauges()["reservations"] == 0
    server.ask(protocol.Lookup(keys(1), layout(1)), 3, protocol.Found)
    server.ask(protocol.Reserve(layout(1), 4 * KIB, b"", 1), 12, protocol.Reserved)


def test_an_answer_that_was_kept_is_given_even_if_it_was_settled(server: Server) -> None:
    frame = server.frame(protocol.Reserve(layout(1), 4 * KIB, b"", 1), 1)
    answer = server.send(frame)
    server.ask(protocol.Declare(1, b"", []), 2, protocol.Done)
    assert server.send(frame) == answer
    assert server.pool.directory.gauges()["reservations"] == 0


def _fails_once(method: Callable[..., bytes]) -> Callable[..., bytes]:
    failures = [ZeroDivisionError("of the test")]

    def once(*arguments: Any) -> bytes:
        if failures:
            raise failures.pop()
        return method(*arguments)

    return once


def test_a_request_that_fails_half_way_is_mended_by_reading_the_table_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of our own: its sender is told, and all sessions begin anew with what the table says."""
    store(server, 1)
    pinned = server.ask(protocol.Acquire(keys(1), layout(1), pin=True), 3, protocol.Acquired, session=2)
    late = server.frame(protocol.Lookup(keys(1), layout(1)), 5)
    with monkeypatch.context() as broken:
        broken.setattr(Directory, "_pack", _fails_once(Directory._pack))
        frame = server.frame(protocol.Reserve(layout(1), 4 * KIB, b"", 2), 4)
        server.refused(server.send(frame), 4, ErrorCode.INTERNAL)
    assert server.rebuilt == 1
    server.refused(server.send(late), 5, ErrorCode.EPOCH)
    assert server.pool.directory.gauges()["reservations"] == 2, "the table says so; a declaration tells"
    assert (
        len(server.ask(protocol.Reserve(layout(1), 4 * KIB, b"", 9), 6, protocol.Reserved).extents) == 5 * 32
    )
    assert server.ask(protocol.Declare(6, b"", []), 7, protocol.Done).count == 2 + 5
    pins = [protocol.Right(3, handles(protocol.unpack(pinned.extents, EXTENT)))]
    assert server.ask(protocol.Declare(3, b"", pins), 4, protocol.Done, session=2).count == 0
    assert server.pool.directory.rights.sessions[2].pinned_count == 1
    assert server.ask(protocol.Lookup(keys(1), layout(1)), 8, protocol.Found).prefix == 1


def test_a_check_that_fails_is_an_answer(server: Server) -> None:
    store(server, 1)
    server.pool.directory.chunks[key(9)] = 0
    answer = server.requests.answer([server.frame(protocol.Check(), 9)], server.pool.now_ns)
    assert "check" in server.refused(answer, 9, ErrorCode.INTERNAL)
    del server.pool.directory.chunks[key(9)]
    assert server.rebuilt == 0
