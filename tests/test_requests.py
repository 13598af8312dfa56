"""Request frames: who may ask, what was asked before, and that no frame costs anybody but its sender."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metadata_server.directory import Directory
from metadata_server.recovery import restore
from metadata_server.requests import Credentials, Requests
from tests.support.pool import Pool, handles, key, keys, layout, lengths, namespace
from vcache import limits, protocol
from vcache.limits import KIB, TOKEN_BYTES
from vcache.protocol import EXTENT, ErrorCode, Request

EPOCH = 77
ROOM = 8

_Reply = TypeVar("_Reply")


class Server:
    """A pool behind frames. Session 1 and 2 are there."""

    def __init__(self, path: Path) -> None:
        self.pool = Pool(path, segments=(ROOM * 4 * KIB,))
        self.rebuilt = 0
        self.ours = True
        self.ended = 0
        self.ours = True
        self.requests = Requests(
            self.pool.directory,
            EPOCH,
            statistics=lambda: protocol.Statistics({"x": 1.0}, [], [], {}),
            shutdown=self._shutdown,
            rebuild=self._rebuild,
            still_ours=lambda: self.ours,
        )
        self.tokens = {session: session.to_bytes(TOKEN_BYTES, "big") for session in (1, 2)}
        for session, token in self.tokens.items():
            self.requests.sessions[session] = Credentials(token)
            self.pool.directory.rights.of(session)

    def close(self) -> None:
        del self.requests
        self.pool.close()

    def _shutdown(self) -> None:
        self.ended += 1

    def _rebuild(self) -> Directory:
        self.rebuilt += 1
        self.pool.directory = restore(self.pool.table, self.pool.policy)
        self.pool.directory.await_sessions(self.tokens)
        return self.pool.directory

    def frame(self, request: Request, rid: int, session: int = 1) -> bytes:
        return protocol.encode_request(
            request, rid=rid, session=session, token=self.tokens[session], epoch=self.requests.epoch
        )

    def send(self, *frames: bytes) -> bytes | None:
        self.pool.now_ns += 20_000
        answer = self.requests.answer(list(frames), self.pool.now_ns)
        self.pool.directory.check()
        return answer

    def ask(self, request: Request, rid: int, want: type[_Reply], session: int = 1) -> _Reply:
        return self.read(self.send(self.frame(request, rid, session)), rid, want)

    def read(self, answer: bytes | None, rid: int, want: type[_Reply]) -> _Reply:
        assert answer is not None
        decoded = protocol.decode_answer(answer)
        assert (decoded.version, decoded.rid) == (protocol.PROTOCOL_VERSION, rid)
        reply = protocol.decode_reply(decoded.body)
        assert isinstance(reply, want), reply
        return reply

    def refused(self, answer: bytes | None, rid: int, code: str) -> str:
        error = self.read(answer, rid, protocol.Error)
        assert error.code == code, error
        assert error.message
        return error.message

    def content(self) -> bytes:
        return self.pool.table.records.tobytes()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "extents")
    yield server
    server.close()


def store(server: Server, *numbers: int, first_rid: int = 1) -> None:
    reply = server.ask(protocol.Reserve(layout(1), 4 * KIB, keys(*numbers)), first_rid, protocol.Reserved)
    extents = protocol.unpack(reply.extents, EXTENT)
    sizes = lengths(*[100] * len(extents))
    commit = protocol.Commit(handles(extents), keys(*numbers), sizes, namespace(1))
    assert server.ask(commit, first_rid + 1, protocol.Committed).outcomes == bytes(len(extents))


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


def envelope(server: Server, **changed: object) -> bytes:
    fields = {
        "version": protocol.PROTOCOL_VERSION,
        "rid": 9,
        "session": 1,
        "token": server.tokens[1],
        "epoch": EPOCH,
        "body": msgspec.Raw(protocol.encode(protocol.Clear())),
    }
    return protocol.encode(list((fields | changed).values()))


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


# --- what is malformed --------------------------------------------------------------------------------------


def test_more_or_fewer_frames_than_one_are_malformed(server: Server) -> None:
    server.refused(server.send(), 0, ErrorCode.MALFORMED)
    frame = server.frame(protocol.Ping(), 1)
    server.refused(server.send(frame, frame), 0, ErrorCode.MALFORMED)


def test_an_oversized_frame_is_not_even_decoded(server: Server) -> None:
    frame = server.frame(protocol.Touch(bytes(limits.FRAME_BYTES_MAX)), 1)
    message = server.refused(server.send(frame), 0, ErrorCode.OVERSIZED)
    assert str(len(frame)) in message
    assert str(limits.FRAME_BYTES_MAX) in message


MALFORMED = {
    "nothing": b"",
    "text": b"hello",
    "a number": msgspec.msgpack.encode(5),
    "a map": msgspec.msgpack.encode({"version": 1}),
    "too short": msgspec.msgpack.encode([1, 2, 3]),
    "wrong types": msgspec.msgpack.encode(["1", 2, 3, b"", 5, []]),
    "a huge array": b"\xdd\xff\xff\xff\xff",
    "deep": b"\x91" * 100_000,
    "deep body": b"\x96\x01\x01\x01\xc4\x00\x01" + b"\x91" * 100_000,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_frame_is_said_to_be_so(name: str, server: Server) -> None:
    store(server, 1)
    before = server.content()
    server.refused(server.send(MALFORMED[name]), 0, ErrorCode.MALFORMED)
    assert server.content() == before
    assert server.rebuilt == 0


BODIES = {
    "unknown": msgspec.msgpack.encode(["Frobnicate", 1]),
    "a reply": protocol.encode(protocol.Pong(1)),
    "a session message": protocol.encode(protocol.Bye()),
    "no name": msgspec.msgpack.encode([]),
    "a number for a name": msgspec.msgpack.encode([1, 2]),
    "not text": b"\x92\xa2\xff\xfe\x01",
    "a label that is not text": b"\x93\xa8Describe\xc4\x01x\xa2\xff\xfe",
    "missing fields": msgspec.msgpack.encode(["Reserve"]),
    "wrong type": msgspec.msgpack.encode(["Lookup", 5, b"x"]),
    "text for bytes": msgspec.msgpack.encode(["Lookup", "keys", "layout"]),
    "an extension": b"\x92\xa5Touch\xc7\x01\x05x",
    "half": protocol.encode(protocol.Lookup(keys(1), layout(1)))[:-3],
    "nil": b"\xc0",
    "deep": b"\x91" * 5_000 + b"\x90",
}


@pytest.mark.parametrize("name", BODIES)
def test_a_malformed_request_is_refused_under_its_rid(name: str, server: Server) -> None:
    store(server, 1)
    before = server.content()
    answer = server.send(envelope(server, body=msgspec.Raw(BODIES[name])))
    assert answer is not None
    rid = protocol.decode_answer(answer).rid
    assert rid in (0, 9)
    server.refused(answer, rid, ErrorCode.MALFORMED)
    assert server.content() == before
    assert server.rebuilt == 0


@pytest.mark.parametrize(
    "request_",
    [
        protocol.Reserve(layout(1), (1 << 63) - 1, b"", 1),
        protocol.Reserve(layout(1), 4096, b"", (1 << 64) - 1),
        protocol.Reserve(layout(1), 4096, b"", 1, near=(1 << 64) - 1),
        protocol.Reserve(layout(1), 4096, b"", 1, near=-1),
        protocol.Commit(b"", b"", b"", namespace(1), ttl_ms=(1 << 64) - 1),
        protocol.Commit(bytes(8), bytes(32), b"\xff" * 8, namespace(1), ttl_ms=-(1 << 63)),
        protocol.Abort(b"\xff" * 8_000),
        protocol.Acquire(keys(1), layout(1), near=-(1 << 63)),
        protocol.Acquire(keys(1), b"", pin=True),
        protocol.Release((1 << 64) - 1, b"\xff" * 80),
        protocol.Release(-(1 << 63)),
        protocol.Lookup(keys(1), b"x" * 1_000),
        protocol.List((1 << 64) - 1, -(1 << 63)),
        protocol.List(-(1 << 63), (1 << 64) - 1),
        protocol.Declare((1 << 64) - 1, b"\xff" * 80, [protocol.Right((1 << 64) - 1, b"\xff" * 80)] * 3),
        protocol.Declare(-(1 << 63), b"", [protocol.Right(-1, b"")]),
        protocol.Clear(b"\xff" * 8),
        protocol.Describe(b"", ""),
    ],
    ids=lambda request: type(request).__name__,
)
def test_extreme_numbers_are_answered_and_hurt_nobody(request_: Request, server: Server) -> None:
    store(server, 1, 2)
    held = server.ask(protocol.Acquire(keys(1), layout(1), pin=True), 5, protocol.Acquired, session=2)
    answer = server.send(server.frame(request_, (1 << 64) - 1))
    assert (answer is None) == isinstance(request_, protocol.Release)
    if answer is not None:
        reply = protocol.decode_reply(protocol.decode_answer(answer).body)
        assert not isinstance(reply, protocol.Error) or reply.code != ErrorCode.INTERNAL
    assert server.rebuilt == 0
    pins = [protocol.Right(5, handles(protocol.unpack(held.extents, EXTENT)))]
    assert server.ask(protocol.Declare(5, b"", pins), 6, protocol.Done, session=2).count == 0
    assert server.pool.directory.rights.sessions[2].pinned_count == 1


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


# --- fuzz ---------------------------------------------------------------------------------------------------

_FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def survives(server: Server, frames: list[bytes]) -> None:
    """An error, an answer or silence; nothing fails or contradicts itself, and others are unaffected."""
    theirs = server.pool.directory.rights.of(2)
    before = dict(theirs.reservations), {rid: dict(held) for rid, held in theirs.pins.items()}
    answer = server.requests.answer(frames, server.pool.now_ns)
    if answer is not None:
        reply = protocol.decode_reply(protocol.decode_answer(answer).body)
        assert not isinstance(reply, protocol.Error) or reply.code != ErrorCode.INTERNAL, reply
    assert server.rebuilt == 0
    assert (theirs.reservations, theirs.pins) == before
    server.pool.directory.check()


def prepared(server: Server) -> None:
    """Something to hurt: chunks, another session's stock and pins."""
    if 2 in server.pool.directory.rights.sessions and server.pool.directory.rights.sessions[2].pins:
        return
    store(server, 1, 2, 3)
    server.ask(protocol.Reserve(layout(1), 4 * KIB, b"", 2), 5, protocol.Reserved, session=2)
    server.ask(protocol.Acquire(keys(1, 2), layout(1), pin=True), 6, protocol.Acquired, session=2)


@_FUZZ
@given(frames=st.lists(st.binary(max_size=200), max_size=2))
def test_random_bytes_hurt_nobody(server: Server, frames: list[bytes]) -> None:
    prepared(server)
    survives(server, frames)


NUMBERS = st.one_of(
    st.integers(-3, 70_000), st.sampled_from((1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1, -(1 << 63)))
)
PACKED = st.one_of(
    st.binary(max_size=64),
    st.lists(st.integers(0, 12), max_size=4).map(lambda numbers: keys(*numbers)),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), max_size=5).map(
        lambda pairs: protocol.pack_handles([a for a, _ in pairs], [b for _, b in pairs])
    ),
    st.sampled_from((layout(1), namespace(1), b"")),
)
ANY_VALUE = st.one_of(
    NUMBERS, PACKED, st.booleans(), st.none(), st.text(max_size=5), st.floats(), st.lists(NUMBERS, max_size=3)
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request's body: of a known kind, its fields of about the right types."""
    kind = draw(st.sampled_from(list(msgspec.inspect.type_info(protocol.Request).types))).cls
    fields: list[object] = [kind.__name__]
    for field in msgspec.structs.fields(kind):
        name = getattr(field.type, "__name__", "")
        fitting = {"bytes": PACKED, "int": NUMBERS, "bool": st.booleans(), "str": st.text(max_size=9)}
        rights = st.lists(st.tuples(NUMBERS, PACKED), max_size=3)
        fields.append(draw(st.one_of(fitting.get(name, rights), fitting.get(name, rights), ANY_VALUE)))
    fields = fields[: draw(st.integers(len(fields) - 1, len(fields)))]
    return msgspec.msgpack.encode(fields)


@_FUZZ
@given(body=requests(), rid=st.integers(1, 40))
def test_requests_of_any_content_hurt_nobody(server: Server, body: bytes, rid: int) -> None:
    prepared(server)
    chunks = len(server.pool.directory.chunks)
    survives(server, [envelope(server, rid=rid, body=msgspec.Raw(body))])
    if chunks and not server.pool.directory.chunks:  # removed, cleared: as one may
        store(server, 1, 2, 3, first_rid=1 << 40)


@_FUZZ
@given(
    at=st.integers(0, 1 << 20),
    value=st.integers(0, 255),
    cut=st.integers(0, 60),
    which=st.integers(0, 9),
    rid=st.integers(1, 40),
)
def test_damaged_frames_hurt_nobody(
    server: Server, at: int, value: int, cut: int, which: int, rid: int
) -> None:
    prepared(server)
    valid: tuple[Request, ...] = (
        protocol.Reserve(layout(1), 4 * KIB, keys(7, 8), 0, 1),
        protocol.Commit(bytes(16), keys(7, 8), lengths(1, 2), namespace(1)),
        protocol.Abort(bytes(16)),
        protocol.Lookup(keys(1, 2), layout(1), True),
        protocol.Acquire(keys(1, 2), layout(1)),
        protocol.Release(3, bytes(8)),
        protocol.Touch(keys(1, 2)),
        protocol.Describe(b"x", "name"),
        protocol.Declare(3, bytes(16), [protocol.Right(3, bytes(8))]),
        protocol.List(1, 2),
    )
    frame = bytearray(server.frame(valid[which], rid))
    frame[at % len(frame)] = value
    survives(server, [bytes(frame[: len(frame) - cut] if cut < 20 else frame)])
