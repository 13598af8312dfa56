"""The session socket: garbage, false claims and silence cost their sender the connection and nobody else
anything.
"""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from metadata_server.server import TICK_MS
from tests.processes.pool import Pool
from tests.processes.worker import eventually
from tests.support.bystander import Bystander
from tests.support.raw_peer import RawConnection, RawPeer
from vcache import protocol
from vcache.limits import LABEL_BYTES_MAX, SEGMENT_DESCRIPTOR_BYTES_MAX
from vcache.protocol import PROTOCOL_VERSION, Attached, ErrorCode, Gone, Hello, Opened, Refused, SessionRow
from vcache.runtime import OwnerLock, RuntimeDir

SESSION = 0x5E55


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """One server for all of these tests."""
    with Pool() as pool:
        pool.start_server()
        pool.statistics()  # the observer's channel is there from now on
        yield pool


@pytest.fixture(scope="module")
def settled(pool: Pool) -> Iterator[Bystander]:
    """A client that all of these tests leave alone."""
    bystander = Bystander(pool)
    yield bystander
    bystander.close()


@pytest.fixture(autouse=True)
def bystander(pool: Pool, settled: Bystander) -> Iterator[Bystander]:
    """After each test it has noticed nothing, and the server has no descriptor more than before."""
    before = descriptors(pool)
    yield settled
    settled.assert_unharmed()
    eventually(lambda: descriptors(pool) <= before, "the server has closed what it was sent")


@pytest.fixture
def stranger(pool: Pool) -> Iterator[RawConnection]:
    """A connection on which nothing was said."""
    connection = RawConnection(pool.path / "session.sock")
    yield connection
    connection.close()


@pytest.fixture
def peer(pool: Pool) -> Iterator[RawPeer]:
    """A session that can say anything."""
    with RawPeer(pool.path) as peer:
        yield peer


@pytest.fixture
def lock(pool: Pool) -> Iterator[OwnerLock]:
    """The lock of SESSION, held by us."""
    lock = OwnerLock(RuntimeDir.resolve(str(pool.path)).session_lock_path(SESSION))
    assert lock.try_acquire()
    yield lock
    lock.release(remove=True)


def descriptors(pool: Pool) -> int:
    """How many descriptors the server has open."""
    assert pool.server is not None
    return len(os.listdir(f"/proc/{pool.server.pid}/fd"))


def hello(**instead: object) -> Hello:
    """A right greeting, but for the fields given."""
    fields = {"version": PROTOCOL_VERSION, "session": SESSION, "lineage": 0, "name": "stranger"}
    return Hello(**{**fields, **instead})  # type: ignore[arg-type]


def attach(**instead: object) -> protocol.Attach:
    """A right offer of a segment, but for the fields given. The server never looks at the memory itself."""
    fields = {
        "seq": 7,
        "descriptor": b"d",
        "segment_id": os.urandom(16),
        "incarnation": 1,
        "device": "shm:9",
        "size": 1 << 20,
        "data_offset": 4096,
    }
    return protocol.Attach(**{**fields, **instead})  # type: ignore[arg-type]


# -- strangers


FIRST_WORDS = {
    "garbage": b"\x00\xff garbage",
    "nil": b"\xc0",
    "a request": protocol.encode(protocol.Ping()),
    "a message of the server's": protocol.encode(Gone(1)),
    "deep": b"\x91" * 60_000,
    "longer than allowed": b"\x92" + bytes(150_000),
}


@pytest.mark.parametrize("packet", FIRST_WORDS.values(), ids=FIRST_WORDS.keys())
def test_malformed_first_message_ends_the_connection(stranger: RawConnection, packet: bytes) -> None:
    stranger.send(packet)
    assert stranger.receive(Refused).code == ErrorCode.MALFORMED
    assert stranger.hung_up()


@pytest.mark.parametrize(
    "message",
    [protocol.Bye(), protocol.Open(1, 1), protocol.Unmapped(1), protocol.Detach(1, 1), attach()],
    ids=lambda message: type(message).__name__,
)
def test_nothing_goes_before_hello(stranger: RawConnection, message: protocol.FromClient) -> None:
    read, write = os.pipe()
    stranger.send(message, [read, write])
    os.close(read)
    os.close(write)
    refused = stranger.receive(Refused)
    assert refused.code == ErrorCode.FOREIGN
    assert "Hello" in refused.message
    assert stranger.hung_up()


def test_empty_message_ends_the_connection(stranger: RawConnection) -> None:
    stranger.send(b"")
    assert stranger.hung_up()


def test_hello_of_another_version_gets_an_answer_that_names_both(stranger: RawConnection) -> None:
    stranger.send(hello(version=PROTOCOL_VERSION + 1))
    refused = stranger.receive(Refused)
    assert refused.code == ErrorCode.VERSION
    assert f"version {PROTOCOL_VERSION + 1}" in refused.message
    assert f"speaks {PROTOCOL_VERSION}" in refused.message
    assert stranger.hung_up()


@pytest.mark.parametrize("session", [0, -1, 1 << 63, (1 << 64) - 1])
def test_hello_with_an_impossible_session(stranger: RawConnection, session: int) -> None:
    stranger.send(hello(session=session))
    assert stranger.receive(Refused).code == ErrorCode.ARGUMENT
    assert stranger.hung_up()


def test_hello_without_the_sessions_lock(stranger: RawConnection) -> None:
    stranger.send(hello())
    refused = stranger.receive(Refused)
    assert refused.code == ErrorCode.FOREIGN
    assert f"{SESSION:016x}.lock" in refused.message
    assert stranger.hung_up()


def test_hello_as_a_session_that_another_process_has(pool: Pool, stranger: RawConnection) -> None:
    worker = pool.start_worker()
    assert worker.call("open_client", **pool.client_config())
    theirs = next(row.session for row in pool.statistics().sessions if row.pid == worker.pid)
    stranger.send(hello(session=theirs))
    assert stranger.receive(Refused).code == ErrorCode.FOREIGN
    assert stranger.hung_up()
    assert theirs in {row.session for row in pool.statistics().sessions}
    worker.end()
    eventually(lambda: len(pool.statistics().sessions) == 2, "the worker's session ended")


WRONG_DESCRIPTORS = ("none", "a file", "a pipe", "two pidfds", "five pidfds", "pidfd of another process")


@pytest.mark.parametrize("what", WRONG_DESCRIPTORS)
def test_hello_without_a_pidfd_of_the_sender(
    pool: Pool, stranger: RawConnection, lock: OwnerLock, what: str
) -> None:
    with ExitStack() as stack:
        fds: list[int] = []
        if what == "a file":
            fds = [os.open("/dev/null", os.O_RDONLY)]
        elif what == "a pipe":
            fds = list(os.pipe())
            os.close(fds.pop())
        elif what.endswith("pidfds"):
            fds = [os.pidfd_open(os.getpid()) for _ in range({"two": 2, "five": 5}[what.split()[0]])]
        elif what == "pidfd of another process":
            other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            stack.callback(other.communicate)
            fds = [os.pidfd_open(other.pid)]
        for fd in fds:
            stack.callback(os.close, fd)
        stranger.send(hello(), fds)
        refused = stranger.receive(Refused)
    assert refused.code == ErrorCode.ARGUMENT
    assert f"pidfd of process {os.getpid()}" in refused.message
    assert stranger.hung_up()
    assert SESSION not in {row.session for row in pool.statistics().sessions}


def test_many_who_connect_and_say_nothing_keep_nobody_out(pool: Pool, bystander: Bystander) -> None:
    with ExitStack() as stack:
        for _ in range(200):
            connection = RawConnection(pool.path / "session.sock")
            stack.callback(connection.close)
        with RawPeer(pool.path) as peer:
            assert peer.pong()
        bystander.assert_unharmed()


def test_flood_of_connections_is_limited(pool: Pool, bystander: Bystander) -> None:
    """More than the server has descriptors for: the oldest that said nothing are hung up on."""
    with ExitStack() as stack:
        first = RawConnection(pool.path / "session.sock")
        stack.callback(first.close)
        for _ in range(3_000):
            connection = RawConnection(pool.path / "session.sock")
            stack.callback(connection.close)
        assert first.hung_up()
        with RawPeer(pool.path) as peer:
            assert peer.pong()
        bystander.assert_unharmed()
        assert descriptors(pool) < 1_000


def test_server_without_descriptors_goes_on_when_it_has_some_again(pool: Pool, bystander: Bystander) -> None:
    assert pool.server is not None
    pid = pool.server.pid
    bystander.assert_unharmed()  # its channel is open: nobody new is let in below
    limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    full = descriptors(pool) + 8
    with ExitStack() as stack:
        stack.callback(resource.prlimit, pid, resource.RLIMIT_NOFILE, limit)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (full, limit[1]))
        strangers = [RawConnection(pool.path / "session.sock") for _ in range(20)]
        for stranger in strangers:
            stack.callback(stranger.close)
        eventually(lambda: descriptors(pool) == full, "it is full")
        pidfd = os.pidfd_open(os.getpid())
        strangers[0].send(hello(), [pidfd])
        os.close(pidfd)
        assert strangers[0].receive(Refused).code == ErrorCode.INTERNAL, (
            "there is none left to look at its lock"
        )
        bystander.assert_unharmed()
    with RawPeer(pool.path) as peer:
        assert peer.pong()


def test_connections_to_the_request_socket_are_limited(pool: Pool, bystander: Bystander) -> None:
    """Before descriptors run out nobody new is let in; those who are in notice nothing."""
    assert pool.server is not None
    pid, path = pool.server.pid, pool.path / "rpc.sock"
    limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        stack.callback(resource.prlimit, pid, resource.RLIMIT_NOFILE, limit)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (400, limit[1]))
        while path.exists():
            for _ in range(40):
                stranger = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                if stranger.connect_ex(str(path)):
                    break
            due_s = time.monotonic() + TICK_MS / 1e3
            eventually(lambda due_s=due_s: time.monotonic() > due_s, "the server has looked around")  # type: ignore[misc]
        assert 300 < descriptors(pool) < 400
        bystander.assert_unharmed()
    eventually(path.exists, "it lets connections in again")
    with RawPeer(pool.path) as peer:
        assert peer.pong()


# -- peers


def test_second_hello_is_refused_and_the_session_goes_on(peer: RawPeer) -> None:
    pidfd = os.pidfd_open(os.getpid())
    peer.connection.send(hello(session=peer.session), [pidfd])
    os.close(pidfd)
    assert peer.connection.receive(Refused).code == ErrorCode.ARGUMENT
    assert peer.pong()


def test_malformed_message_of_a_peer_ends_its_connection_but_not_its_session(peer: RawPeer) -> None:
    peer.connection.send(b"\xc1")
    assert peer.connection.receive(Refused).code == ErrorCode.MALFORMED
    assert peer.connection.hung_up()
    assert peer.pong(), "the session is the process's, not the connection's"
    peer.reconnect()
    assert peer.welcome.resumed
    assert peer.pong()


def test_peer_that_reconnects_gets_a_new_token(peer: RawPeer) -> None:
    old = peer.welcome
    peer.reconnect()
    assert peer.welcome.resumed
    assert peer.welcome.token != old.token
    assert peer.welcome.epoch == old.epoch
    _, reply = peer.channel.exchange(peer.frame(protocol.Ping(), token=old.token))
    assert isinstance(reply, protocol.Error)
    assert reply.code == ErrorCode.TOKEN


def test_long_name_is_cut(pool: Pool) -> None:
    with RawPeer(pool.path) as peer:
        peer.connection.close()
        peer.connection = RawConnection(peer.runtime.session_path)
        peer.greet(name="x" * 500 + "\n2026 INFO forged " + "é" * 10, lineage=peer.welcome.lineage)
        name = row_of(pool, peer).name
        assert len(name.encode()) <= LABEL_BYTES_MAX


def row_of(pool: Pool, peer: RawPeer) -> SessionRow:
    """What the server says of a session."""
    return next(row for row in pool.statistics().sessions if row.session == peer.session)


IMPOSSIBLE = {
    "id of 15 bytes": {"segment_id": b"i" * 15},
    "no incarnation": {"incarnation": 0},
    "negative incarnation": {"incarnation": -1},
    "no size": {"size": 0},
    "negative size": {"size": -1},
    "size of 2**64 - 1": {"size": (1 << 64) - 1},
    "data beyond the end": {"data_offset": 1 << 20},
    "data before the beginning": {"data_offset": -4096},
    "data at the beginning": {"data_offset": 0},
    "rank -1": {"rank": -1},
    "rank 2**40": {"rank": 1 << 40},
    "long device": {"device": "shm:" + "9" * 100},
    "device with a zero": {"device": "shm\x00"},
    "long descriptor": {"descriptor": bytes(SEGMENT_DESCRIPTOR_BYTES_MAX + 1)},
}


@pytest.mark.parametrize("instead", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_impossible_segment_is_refused(pool: Pool, peer: RawPeer, instead: dict[str, object]) -> None:
    fd = os.memfd_create("segment")
    peer.connection.send(attach(**instead), [fd])
    os.close(fd)
    refused = peer.connection.receive(Refused)
    assert (refused.seq, refused.code) == (7, ErrorCode.ARGUMENT)
    assert peer.pong()
    assert [row.device for row in pool.statistics().segments] == ["shm:0"]


def test_segment_of_another_session_cannot_be_taken_over(pool: Pool, peer: RawPeer) -> None:
    segment = attach()
    peer.connection.send(segment)
    number = peer.connection.receive(Attached).segment
    peer.connection.send(segment)
    assert peer.connection.receive(Attached).segment == number, "the same again from the same is the same"
    with RawPeer(pool.path) as thief:
        thief.connection.send(attach(segment_id=segment.segment_id, descriptor=b"other memory"))
        assert thief.connection.receive(Refused).code == ErrorCode.FOREIGN
        thief.connection.send(protocol.Detach(8, number))
        assert thief.connection.receive(Refused).code == ErrorCode.FOREIGN
        thief.connection.send(protocol.Open(9, number))
        assert thief.connection.receive(Opened).descriptor == segment.descriptor
        thief.connection.send(protocol.Unmapped(number))


def test_segment_that_is_not_there_is_refused_under_its_seq(peer: RawPeer) -> None:
    for number in (0, 999, -1, 1 << 62):
        peer.connection.send(protocol.Open(number & 0xFF, number))
        refused = peer.connection.receive(Refused)
        assert (refused.seq, refused.code) == (number & 0xFF, ErrorCode.GONE)
        peer.connection.send(protocol.Unmapped(number))
    assert peer.pong()


def test_peer_that_never_reads_is_hung_up_on(pool: Pool, peer: RawPeer) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):
        while True:
            peer.connection.send(protocol.Open(1, 1))
    eventually(lambda: not row_of(pool, peer).here, "the server has hung up")
    peer.reconnect()
    assert peer.welcome.resumed


def test_peer_whose_socket_ends_keeps_what_it_holds(pool: Pool, peer: RawPeer) -> None:
    layout = b"L" * 16
    peer.ask(protocol.Reserve(layout, 4096, count=3), protocol.Reserved)
    peer.connection.socket.shutdown(socket.SHUT_RDWR)
    eventually(lambda: not row_of(pool, peer).here, "the server has seen the end")
    assert row_of(pool, peer).reservations == 3, "its process lives, and may still write"
    peer.reconnect()
    assert peer.welcome.resumed
    assert row_of(pool, peer).reservations == 3
