"""Frames that are malformed, extreme or random: no frame costs anybody but its sender."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.frames import Server, envelope, store
from tests.support.pool import handles, keys, layout, lengths, namespace
from vcache import limits, protocol
from vcache.limits import KIB
from vcache.protocol import EXTENT, ErrorCode, Request


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "extents")
    yield server
    server.close()


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
