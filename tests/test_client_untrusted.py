"""The client against a server that lies, is silent or speaks another version: a miss, never more."""

from __future__ import annotations

import array
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from tests.client_pool import DEADLINE_S, LAYOUT, Pool, key, pool_in_memory, until
from vcache import protocol
from vcache.errors import ServerError, Unavailable
from vcache.limits import MIB
from vcache.protocol import EXTENT, Declare, Done, Error, ErrorCode, Reply, Request
from vcache.runtime import RuntimeDir
from vcache.table import ExtentTable

Script = Callable[[Request], "Reply | bytes | None"]


class Liar:
    """A server of which the test says what it answers: a reply, raw bytes, or nothing.

    hello: the session's first answer instead of a Welcome. frames: the request frames that arrived.
    """

    def __init__(self, path: Path, *, hello: bytes | None = None) -> None:
        runtime = RuntimeDir.resolve(str(path))
        self.table = ExtentTable.create(runtime.table_path, 64)
        self.frames: list[bytes] = []
        self.greetings = 0
        self.script: Script = lambda request: Done()
        self._hello = hello
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(runtime.session_path))
        self._listener.listen()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        self._router.bind(runtime.rpc_endpoint)
        self._end_read, self._end_write = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """End it, and close the sessions."""
        os.close(self._end_write)
        self._thread.join(DEADLINE_S)
        for each in (*self._sockets, self._listener):
            each.close()
        os.close(self._end_read)
        self._router.close()
        self._context.term()
        self.table.close()

    def send(self, packet: bytes) -> None:
        """Send a packet over the latest session."""
        self._sockets[-1].send(packet)

    def _run(self) -> None:
        poller = zmq.Poller()
        for each in (self._router, self._listener, self._end_read):
            poller.register(each, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._end_read in ready:
                return
            if self._listener.fileno() in ready:
                self._greet()
            if self._router in ready:
                self._answer()

    def _greet(self) -> None:
        session, _ = self._listener.accept()
        self._sockets.append(session)
        _, descriptors, _, _ = socket.recv_fds(session, 4096, 4)
        for descriptor in descriptors:
            os.close(descriptor)
        if self._hello is not None:
            session.send(self._hello)
        else:
            welcome = protocol.Welcome(
                protocol.PROTOCOL_VERSION, 7, self.table.lineage, b"t" * 16, self.greetings > 0, os.getpid()
            )
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self.table.fd]))]
            session.sendmsg([protocol.encode(welcome)], ancillary)
        self.greetings += 1

    def _answer(self) -> None:
        sender, frame = self._router.recv_multipart()
        envelope = protocol.decode_envelope(frame)
        request = protocol.decode_request(envelope.body)
        if isinstance(request, Declare):
            reply: Reply | bytes | None = Done()
        else:
            self.frames.append(frame)
            reply = self.script(request)
        if reply is not None:
            if not isinstance(reply, bytes):
                reply = protocol.encode_answer(reply, rid=envelope.rid)
            self._router.send_multipart([sender, reply])


@pytest.fixture
def pool() -> Iterator[Pool]:
    """A directory without a server."""
    with pool_in_memory() as pool:
        yield pool


@pytest.fixture
def liar(pool: Pool) -> Iterator[Liar]:
    """A server that answers Done to everything until told otherwise."""
    liar = Liar(pool.path)
    yield liar
    liar.close()


def extents(*rows: tuple[int, ...]) -> bytes:
    """Packed extents of (index, generation, segment, reserved, offset, length)."""
    return np.array(list(rows), EXTENT).tobytes()


GOOD = (1, 0, 1, 0, 4096, 8192)


@pytest.mark.parametrize(
    "reply",
    [
        protocol.Reserved(extents((64, *GOOD[1:])), b"\0", 1),
        protocol.Reserved(extents((1, 0, 0, 0, 4096, 8192)), b"\0", 1),
        protocol.Reserved(extents((1, 0, 1, 0, 4096, 10)), b"\0", 1),
        protocol.Reserved(extents((1, 0, 1, 0, 1 << 63, 8192)), b"\0", 1),
        protocol.Reserved(extents(GOOD, GOOD), b"\0", 1),
        protocol.Reserved(extents(GOOD), b"\1", 1),
        protocol.Reserved(extents(GOOD), b"", 1),
        protocol.Reserved(extents(GOOD)[:-1], b"\0", 1),
        protocol.Done(),
        b"not a message",
        protocol.encode(protocol.Answer(1, 1, msgspec.Raw(b"\xc1"))),
    ],
)
def test_reservation_that_cannot_be_is_a_miss(pool: Pool, liar: Liar, reply: Reply | bytes) -> None:
    client = pool.client(**{"client.request_timeout_ms": 300})
    liar.script = lambda request: reply
    with pytest.raises(Unavailable):
        client.reserve([key(1)], layout=LAYOUT, size=8192)
    assert client.counters["reserved"] == client.counters["outstanding"] == 0


@pytest.mark.parametrize(
    "reply",
    [
        protocol.Acquired(extents((1 << 31, *GOOD[1:])), b"", 100),
        protocol.Acquired(extents(GOOD, GOOD, GOOD), b"", 100),
        protocol.Acquired(extents((1, 0, 1, 0, 4096, 0)), b"", 100),
        protocol.Acquired(extents(GOOD), b"", -1),
        protocol.Found(1),
    ],
)
def test_grant_that_cannot_be_is_a_miss(pool: Pool, liar: Liar, reply: Reply) -> None:
    client = pool.client()
    liar.script = lambda request: reply
    with pytest.raises(Unavailable, match="malformed"):
        client.acquire([key(1), key(2)], layout=LAYOUT)
    assert client.counters["protocol_errors"] == 1
    assert client.connected, "it answers, if wrongly"


def test_lookup_and_contains_that_cannot_be_are_misses(pool: Pool, liar: Liar) -> None:
    client = pool.client()
    liar.script = lambda request: protocol.Found(3, b"\1")
    with pytest.raises(Unavailable, match="prefix of 3"):
        client.lookup([key(1)], LAYOUT)
    with pytest.raises(Unavailable, match="1 flags"):
        client.contains([key(1), key(2)])


def test_lost_reply_is_asked_for_again_under_the_same_id(pool: Pool, liar: Liar) -> None:
    client = pool.client(**{"client.request_timeout_ms": 2_000})
    liar.script = lambda request: (
        protocol.Reserved(extents(GOOD), b"\0", 1) if len(liar.frames) == 3 else None
    )
    granted = client.reserve([key(1)], layout=LAYOUT, size=8192)
    assert len(granted.extents) == 1
    assert len(liar.frames) == 3
    assert len(set(liar.frames)) == 1
    assert client.counters["reserved"] == 1


def test_answers_to_other_requests_are_passed_over(pool: Pool, liar: Liar) -> None:
    client = pool.client()
    late = protocol.encode_answer(protocol.Found(0), rid=1 << 40)
    liar.script = lambda request: late if len(liar.frames) == 1 else protocol.Found(1)
    assert client.lookup([key(1)], LAYOUT) == 1


def test_refusal_is_told_as_the_server_said_it(pool: Pool, liar: Liar) -> None:
    client = pool.client()
    liar.script = lambda request: Error(ErrorCode.LIMIT, "too much of it")
    with pytest.raises(ServerError, match="too much of it") as caught:
        client.reserve([key(1)], layout=LAYOUT, size=8192)
    assert caught.value.code == ErrorCode.LIMIT


@pytest.mark.parametrize("code", [ErrorCode.EPOCH, ErrorCode.TOKEN, ErrorCode.DRAINING])
def test_stale_request_is_a_miss(pool: Pool, liar: Liar, code: str) -> None:
    client = pool.client()
    liar.script = lambda request: Error(code, "begin a new session")
    with pytest.raises(Unavailable):
        client.lookup([key(1)], LAYOUT)


@pytest.mark.parametrize(
    "packet",
    [
        b"not a message",
        protocol.encode(protocol.Refused(0, ErrorCode.FOREIGN, "go away")),
        protocol.encode(protocol.Welcome(protocol.PROTOCOL_VERSION, 1, 1, b"t" * 16, True, 1)),
        b"x" * 60_000,
    ],
)
def test_malformed_session_message_costs_the_connection_only(pool: Pool, liar: Liar, packet: bytes) -> None:
    client = pool.client()
    liar.script = lambda request: protocol.Found(1)
    liar.send(packet)
    until(lambda: liar.greetings == 2 and client.connected, "the session was begun again")
    assert client.lookup([key(1)], LAYOUT) == 1


def test_notices_of_unknown_segments_are_harmless(pool: Pool, liar: Liar) -> None:
    client = pool.client()
    liar.script = lambda request: protocol.Found(1)
    for message in (
        protocol.Gone(17),
        protocol.Opened(3, 18, b"nonsense"),
        protocol.Attached(99, 5),
        protocol.Detached(99, 5),
        protocol.Refused(77, ErrorCode.GONE, "what you never asked for"),
    ):
        liar.send(protocol.encode(message))
    assert client.lookup([key(1)], LAYOUT) == 1
    assert liar.greetings == 1


def test_other_version_is_an_error_in_words_once(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    refused = protocol.encode(protocol.Refused(0, ErrorCode.VERSION, "got protocol version 1, speaks 2"))
    liar = Liar(pool.path, hello=refused)
    try:
        with caplog.at_level(logging.WARNING):
            client = pool.client(wait=False)
            until(lambda: any("speaks 2" in r.message for r in caplog.records), "it was said")
            assert not client.wait_connected(0.2)
        errors = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert len(errors) == 1
        assert liar.greetings == 1, "it is not asked again and again"
        with pytest.raises(Unavailable, match="speaks 2"):
            client.lookup([key(1)], LAYOUT)
    finally:
        liar.close()


def test_process_that_never_closes_its_client_ends_all_the_same(pool: Pool) -> None:
    pool.start()
    observer = pool.client("observer")
    program = (
        "import sys; from pathlib import Path; from tests.client_pool import Pool\n"
        f"client = Pool(Path(sys.argv[1])).client(lends={4 * MIB}); client.ping()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(pool.path)], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    until(lambda: len(observer.stats().sessions) == 1, "its session ended with it")
    assert len(list((pool.path / "sessions").iterdir())) == 1
