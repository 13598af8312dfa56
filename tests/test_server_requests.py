"""Frames on the real request socket: whatever one sends costs its sender an error reply and nobody else
anything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from tests.processes.pool import Pool
from tests.support.bystander import Bystander
from tests.support.raw_peer import DEADLINE_S, LAYOUT, NAMESPACE, RawChannel, RawPeer
from vcache import limits, protocol
from vcache.protocol import (
    EXTENT,
    PROTOCOL_VERSION,
    Acquired,
    Committed,
    Done,
    Error,
    ErrorCode,
    Outcome,
    Pong,
)

SIZE = 64 << 10


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """One server for all of these tests: each leaves it as it was."""
    with Pool(lease_ms=100) as pool:
        pool.start_server()
        yield pool


@pytest.fixture(scope="module")
def settled(pool: Pool) -> Iterator[Bystander]:
    """A client that all of these tests leave alone."""
    bystander = Bystander(pool)
    yield bystander
    bystander.close()


@pytest.fixture(autouse=True)
def bystander(settled: Bystander) -> Iterator[Bystander]:
    """After each test it must not have noticed anything."""
    yield settled
    settled.assert_unharmed()


@pytest.fixture
def peer(pool: Pool) -> Iterator[RawPeer]:
    """A session that can say anything."""
    with RawPeer(pool.path) as peer:
        yield peer


def key(number: int) -> bytes:
    """A key that the bystander does not use."""
    return number.to_bytes(limits.KEY_BYTES, "big")


def nested(depth: int) -> bytes:
    """Arrays in arrays."""
    return b"\x91" * depth + b"\x00"


# -- frames that are none


MALFORMED = {
    "empty": b"",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "nil": b"\xc0",
    "array announced, nothing there": b"\x96",
    "2**32 - 1 elements announced": b"\xdd\xff\xff\xff\xff",
    "too few fields": msgspec.msgpack.encode([PROTOCOL_VERSION, 1, 2]),
    "fields of wrong types": msgspec.msgpack.encode([PROTOCOL_VERSION, "1", [], None, {}, 0]),
    "a map": msgspec.msgpack.encode({"version": 1, "rid": 1}),
    "deep": nested(100_000),
    "random": bytes(np.random.default_rng(1).integers(0, 256, 4096, np.uint8)),
    "more behind the message": msgspec.msgpack.encode([PROTOCOL_VERSION, 1, 1, b"", 1, 1]) + b"\0",
}


@pytest.mark.parametrize("frame", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_frame_is_answered_as_such(peer: RawPeer, frame: bytes) -> None:
    answer, reply = peer.channel.exchange(frame)
    assert isinstance(reply, Error)
    assert reply.code == ErrorCode.MALFORMED
    assert answer.rid == 0
    assert peer.ask(protocol.Ping(), Pong)


BODIES = {
    "unknown type": [b"Launch", 1],
    "no type": [],
    "a type that only answers": ["Pong", 1],
    "a session message": ["Bye"],
    "a field of a wrong type": ["Lookup", 7, b""],
    "a missing field": ["Lookup", b""],
    "no array": 7,
    "keys of 31 bytes": ["Lookup", b"k" * 31, LAYOUT],
    "half a handle": ["Abort", b"1234"],
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_malformed_request_is_answered_under_its_rid(peer: RawPeer, body: object) -> None:
    raw = msgspec.Raw(msgspec.msgpack.encode(body))
    fields = (PROTOCOL_VERSION, 77, peer.session, peer.welcome.token, peer.welcome.epoch)
    answer, reply = peer.channel.exchange(protocol.encode(protocol.Envelope(*fields, raw)))
    assert isinstance(reply, Error)
    assert (reply.code, answer.rid) == (ErrorCode.MALFORMED, 77)


def test_message_of_several_frames_is_refused(peer: RawPeer) -> None:
    frame = peer.frame(protocol.Ping())
    for frames in ([frame, frame], [b"", frame], [b""] * 100):
        _, reply = peer.channel.exchange(*frames)
        assert isinstance(reply, Error)
        assert (reply.code, reply.message) == (ErrorCode.MALFORMED, f"got {len(frames)} frames, wanted 1")


def test_oversized_frame_is_refused_and_a_huge_one_costs_the_connection(pool: Pool, peer: RawPeer) -> None:
    _, reply = peer.channel.exchange(bytes(limits.FRAME_BYTES_MAX + 1))
    assert isinstance(reply, Error)
    assert reply.code == ErrorCode.OVERSIZED
    assert str(limits.FRAME_BYTES_MAX) in reply.message
    other = RawChannel(peer.runtime.rpc_endpoint)
    try:
        other.socket.send(bytes(100 << 20))
        assert peer.ask(protocol.Ping(), Pong)
        assert other.exchange(peer.frame(protocol.Ping()))[1] == Pong(peer.welcome.pid), (
            "it may connect again"
        )
    finally:
        other.close()


def test_too_many_keys_are_refused(peer: RawPeer) -> None:
    error = peer.refused(protocol.Contains(bytes(limits.KEY_BYTES * (limits.KEYS_PER_REQUEST_MAX + 1))))
    assert error.code == ErrorCode.LIMIT
    assert f"wanted at most {limits.KEYS_PER_REQUEST_MAX}" in error.message


# -- senders that may not


def test_another_version_gets_an_error_that_names_both(peer: RawPeer) -> None:
    body = msgspec.Raw(protocol.encode(protocol.Ping()))
    newer = protocol.Envelope(PROTOCOL_VERSION + 1, 5, peer.session, b"", 0, body)
    answer, reply = peer.channel.exchange(protocol.encode(newer))
    assert isinstance(reply, Error)
    assert (reply.code, answer.rid) == (ErrorCode.VERSION, 5)
    assert f"version {PROTOCOL_VERSION + 1}" in reply.message
    assert f"speaks {PROTOCOL_VERSION}" in reply.message


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("token", b"", ErrorCode.TOKEN),
        ("token", bytes(limits.TOKEN_BYTES), ErrorCode.TOKEN),
        ("token", b"x" * 1000, ErrorCode.TOKEN),
        ("session", 12345, ErrorCode.TOKEN),
        ("session", -1, ErrorCode.TOKEN),
        ("epoch", 1, ErrorCode.EPOCH),
        ("epoch", -(1 << 62), ErrorCode.EPOCH),
    ],
)
def test_foreign_and_stale_frames_are_refused(peer: RawPeer, field: str, value: Any, code: str) -> None:
    frame = peer.frame(protocol.Reserve(LAYOUT, SIZE, count=1), **{field: value})
    answer, reply = peer.channel.exchange(frame)
    assert isinstance(reply, Error)
    assert (reply.code, answer.rid) == (code, peer.last_rid)


def test_token_of_one_session_is_no_good_for_another(pool: Pool, peer: RawPeer) -> None:
    with RawPeer(pool.path) as other:
        _, reply = peer.channel.exchange(peer.frame(protocol.Ping(), session=other.session))
        assert isinstance(reply, Error)
        assert reply.code == ErrorCode.TOKEN


# -- requests with values that cannot be


INTEGERS = (-(1 << 63), -1, 0, 1, (1 << 31) - 1, 1 << 32, (1 << 53) + 1, (1 << 63) - 1, (1 << 64) - 1)
BYTES = (
    b"",
    b"\0",
    bytes(16),
    bytes(limits.KEY_BYTES),
    bytes(48),
    b"\xff" * 64,
    bytes(limits.KEY_BYTES * 300),
)


def extremes(request: Any) -> Iterator[protocol.Request]:
    """The request with each of its fields in turn at each extreme of its type, the others sensible."""
    sensible: dict[str, Any] = {
        "layout": LAYOUT,
        "size": SIZE,
        "namespace": NAMESPACE,
        "keys": key(9),
        "digest": LAYOUT,
    }
    fields = msgspec.structs.fields(request)
    usual: dict[Any, Any] = {int: 1, bytes: b"", bool: False, str: "name", list[protocol.Right]: []}
    values = {field.name: sensible.get(field.name, usual[field.type]) for field in fields}
    yield request(**values)
    for field in fields:
        rights = [protocol.Right(rid, handles) for rid in INTEGERS for handles in BYTES]
        possible: dict[Any, Any] = {int: INTEGERS, bytes: BYTES, bool: (True,), str: ("", "\0", "é" * 600)}
        for value in possible.get(field.type, ([], rights[:1], rights)):
            yield request(**{**values, field.name: value})


@pytest.mark.parametrize(
    "request_type",
    [
        protocol.Reserve,
        protocol.Commit,
        protocol.Abort,
        protocol.Lookup,
        protocol.Contains,
        protocol.Acquire,
        protocol.Touch,
        protocol.Remove,
        protocol.Clear,
        protocol.List,
        protocol.Describe,
        protocol.Declare,
        protocol.Release,
    ],
)
def test_extreme_values_are_answered_without_a_fault(
    peer: RawPeer, request_type: type[protocol.Request]
) -> None:
    clears = request_type is protocol.Clear
    for request in extremes(request_type):
        if clears and request == protocol.Clear():
            continue  # it is right, and the bystander's chunks would go
        if isinstance(request, protocol.Release):  # answered only where it cannot be read
            peer.channel.socket.send(peer.frame(request))
            continue
        _, reply = peer.channel.exchange(peer.frame(request))
        assert not (isinstance(reply, Error) and reply.code == ErrorCode.INTERNAL), (request, reply)
    assert peer.pong()


@pytest.mark.parametrize("ttl_ms", [*INTEGERS, 1 << 40, 1 << 50])
def test_commit_with_an_extreme_time_to_live(peer: RawPeer, ttl_ms: int) -> None:
    got = peer.ask(protocol.Reserve(LAYOUT, SIZE, key(10)), protocol.Reserved)
    commit = protocol.Commit(handles(got), key(10), lengths(SIZE), NAMESPACE, ttl_ms)
    _, reply = peer.channel.exchange(peer.frame(commit))
    if isinstance(reply, Error):
        assert reply.code in (ErrorCode.ARGUMENT, ErrorCode.MALFORMED), reply
        peer.ask(protocol.Abort(handles(got)), Done)
    else:
        assert reply == Committed(bytes([Outcome.COMMITTED]))
        peer.ask(protocol.Remove(key(10)), Done)


@pytest.mark.parametrize("rid", [0, -1, -(1 << 63), (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_extreme_request_ids(pool: Pool, rid: int) -> None:
    with RawPeer(pool.path) as peer:
        for request in (protocol.Reserve(LAYOUT, SIZE, count=1), protocol.Acquire(key(1), LAYOUT, pin=True)):
            frame = protocol.encode_request(
                request, rid=rid, session=peer.session, token=peer.welcome.token, epoch=peer.welcome.epoch
            )
            answer, reply = peer.channel.exchange(frame)
            assert answer.rid == rid
            assert not (isinstance(reply, Error) and reply.code == ErrorCode.INTERNAL), reply


def handles(reserved: protocol.Reserved | Acquired) -> bytes:
    """The extents as their owner names them."""
    extents = protocol.unpack(reserved.extents, EXTENT)
    return protocol.pack_handles(extents["index"], extents["generation"])


def lengths(*numbers: int) -> bytes:
    """Packed lengths."""
    return np.array(numbers, "<u8").tobytes()


# -- requests that are sent again


def test_request_sent_again_is_carried_out_once(peer: RawPeer) -> None:
    reserve = protocol.Reserve(LAYOUT, SIZE, key(20) + key(21))
    got = peer.ask(reserve, protocol.Reserved, rid=1)
    for _ in range(3):
        assert peer.ask(reserve, protocol.Reserved, rid=1) == got
    commit = protocol.Commit(handles(got), key(20) + key(21), lengths(SIZE, SIZE), NAMESPACE)
    for _ in range(3):
        assert peer.ask(commit, Committed, rid=2) == Committed(bytes(2))
    pin = protocol.Acquire(key(20), LAYOUT, pin=True)
    pinned = [peer.ask(pin, Acquired, rid=3) for _ in range(3)]
    assert pinned[0] == pinned[1] == pinned[2]
    peer.channel.socket.send(peer.frame(protocol.Release(3), rid=4))
    for _ in range(2):
        assert peer.ask(protocol.Remove(key(20) + key(21)), Done, rid=5) == Done(2)
    assert peer.ask(protocol.Contains(key(20)), protocol.Found, rid=6).flags == b"\0"
    statistics = peer.ask(protocol.Stats(), protocol.Statistics)
    mine = next(row for row in statistics.sessions if row.session == peer.session)
    assert (mine.reservations, mine.pins) == (0, 0)


@pytest.mark.parametrize("pin", [True, False])
def test_acquire_sent_again_when_its_answer_is_forgotten_grants_no_second_right(
    peer: RawPeer, pin: bool
) -> None:
    got = peer.ask(protocol.Reserve(LAYOUT, SIZE, key(30)), protocol.Reserved)
    peer.ask(protocol.Commit(handles(got), key(30), lengths(SIZE), NAMESPACE), Committed)
    acquire = protocol.Acquire(key(30), LAYOUT, pin=pin)
    right = peer.last_rid + 1
    peer.ask(acquire, Acquired, rid=right)
    for rid in range(right + 1, right + 2 + limits.REPLAYS_PER_SESSION):
        peer.ask(protocol.Remove(key(99)), Done, rid=rid)
    peer.channel.exchange(peer.frame(acquire, rid=right))
    peer.ask(protocol.Check(), Done, rid=right + 1_000)
    peer.channel.socket.send(peer.frame(protocol.Release(right)))
    assert peer.ask(protocol.Remove(key(30)), Done) == Done(1)


def test_request_behind_what_was_declared_settled_is_stale(peer: RawPeer) -> None:
    peer.ask(protocol.Declare(10, b"", []), Done, rid=11)
    for request in (
        protocol.Reserve(LAYOUT, SIZE, count=1),
        protocol.Acquire(key(1), LAYOUT, pin=True),
        protocol.Remove(key(1)),
    ):
        assert peer.refused(request, rid=10).code == ErrorCode.STALE


# -- floods


def test_flood_of_requests_delays_nobody_for_long(peer: RawPeer, bystander: Bystander) -> None:
    frame = peer.frame(protocol.Ping())
    peer.channel.socket.sndtimeo = 0
    until_s = time.monotonic() + 1.5
    longest_s = 0.0
    sent = 0
    while time.monotonic() < until_s:
        for _ in range(1_000):
            try:
                peer.channel.socket.send(frame)
                sent += 1
            except zmq.Again:  # its queue is full: the server takes its time with it
                break
        longest_s = max(longest_s, bystander.client.ping())
    assert sent > 1_000
    assert longest_s < 1.0, "a request between those of a flood waited for its turn only"


def test_flood_of_large_frames_costs_its_sender_only(pool: Pool, peer: RawPeer, bystander: Bystander) -> None:
    assert pool.server is not None
    before = resident_bytes(pool.server.pid)
    frame = os.urandom(limits.FRAME_BYTES_MAX + 1)
    channels = [RawChannel(peer.runtime.rpc_endpoint) for _ in range(4)]
    try:
        for _ in range(20):
            for channel in channels:
                channel.socket.send(frame)
            bystander.client.ping()
        for channel in channels:
            for _ in range(20):
                assert channel.receive()[1].code == ErrorCode.OVERSIZED  # type: ignore[union-attr]
    finally:
        for channel in channels:
            channel.close()
    assert resident_bytes(pool.server.pid) - before < 1 << 30


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_client_that_reads_no_answers_is_served_no_further_and_others_are(
    peer: RawPeer, bystander: Bystander
) -> None:
    frame = peer.frame(protocol.Stats())
    deaf = RawChannel(peer.runtime.rpc_endpoint)
    try:
        deaf.socket.sndtimeo = 0
        for _ in range(5_000):
            try:
                deaf.socket.send(frame)
            except zmq.Again:
                bystander.client.ping()
        assert bystander.client.ping() < DEADLINE_S
    finally:
        deaf.close()
