"""Sessions: which processes are alive, which segments they lend, who maps which.

A session begins with `Hello` on the session socket. It outlives its socket: **dead means that the pidfd is
readable**, or, for a session that a restarted server has not seen yet, that its lock is free and its process
is not just exiting.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import select
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from metadata_server.connection import Connection, close_all, verify_pidfd
from metadata_server.directory import Directory
from metadata_server.errors import Refusal
from metadata_server.exiting import is_exiting, note
from metadata_server.requests import Credentials, Requests
from vcache import limits, protocol
from vcache.errors import ConfigError, RemoteProtocolError
from vcache.locks import lock_holder
from vcache.logs import Line
from vcache.protocol import ErrorCode
from vcache.runtime import RuntimeDir

log = logging.getLogger(__name__)

_SESSION_LOCK: Final = re.compile("[0-9a-f]{16}[.]lock")


@dataclass(eq=False)
class Lent:
    """A segment whose holder is here: how to map it, and who waits for its end."""

    descriptor: bytes
    fds: list[int]
    session: int


@dataclass(eq=False)
class Peer:
    """A session whose process is alive: its socket (None between two connections), its pidfd, what it may
    map.
    """

    session: int
    name: str
    pid: int
    pidfd: int
    connection: Connection | None
    mapped: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Ending:
    """A segment whose incarnation has ended: who has not unmapped it yet, and whom to tell when all have."""

    importers: set[int]
    holder: int
    seq: int


class Sessions:
    """All sessions, driven by an epoll of sockets and pidfds. Changes the directory when processes come and
    go.
    """

    def __init__(self, requests: Requests, runtime: RuntimeDir, table_fd: Callable[[], int]) -> None:
        self._requests = requests
        self._runtime = runtime
        self._table_fd = table_fd
        self.epoll = select.epoll()
        self.peers: dict[int, Peer] = {}
        self.lent: dict[int, Lent] = {}
        self._endings: dict[int, Ending] = {}
        self._connections: dict[int, Connection] = {}
        self._silent: dict[int, Connection] = {}
        self._pidfds: dict[int, int] = {}
        self._closed: set[int] = set()
        self._unlocked: set[int] = set()

    @property
    def _directory(self) -> Directory:
        return self._requests.directory

    # -- a restarted server

    def awaited(self) -> set[int]:
        """Sessions that the directory knows and whose process has not come back yet."""
        return set(self._directory.rights.sessions) - set(self.peers)

    def _locked_and_dead(self) -> tuple[set[int], set[int]]:
        """Sessions whose lock is held, and those whose lock is there and free.

        Who has no lock at all is in neither and may live: somebody removed it.
        """
        known = [path for path in self._runtime.sessions_dir.iterdir() if _SESSION_LOCK.fullmatch(path.name)]
        there = {int(path.stem, 16) for path in known}
        locked = {session for session in there if self._may_live(session)}
        return locked, there - locked

    def take_over(self) -> None:
        """After `restore`: free what the dead held, wait for the living."""
        locked, dead = self._locked_and_dead()
        alive = (set(self._directory.rights.sessions) | locked) - dead
        self._directory.await_sessions(alive)
        for slot in range(limits.SEGMENTS_MAX):
            number = self._directory.table.segment_in_use(slot)
            if number and int(self._directory.table.segments["session"][slot]) not in alive:
                self._end_segment(number, 0, 0)
        # Last: a server that is killed in here must find them dead again.
        self._unlocked |= dead
        self._remove_locks()

    def bury(self) -> None:
        """End the sessions without a connection that have died, or ended where nobody heard it, meanwhile."""
        gone = {peer.session for peer in self.peers.values() if peer.connection is None}
        for session in self.awaited() | gone:
            if not self._may_live(session):
                self._end(session)
        self._remove_locks()

    def _may_live(self, session: int) -> bool:
        """Whether a session's lock is held, not there, or cannot be asked about (no descriptors are left); or
        free because its process is just exiting.
        """
        path = self._runtime.session_lock_path(session)
        try:
            return not path.exists() or lock_holder(path) is not None or is_exiting(path)
        except ConfigError as error:
            log.warning(Line("a session's lock cannot be looked at", error=str(error)))
            return True

    def _remove_locks(self) -> None:
        """Remove the locks of sessions that have ended, once nobody holds them. Nobody else does: a lock that
        is gone says nothing.
        """
        for session in list(self._unlocked):
            if session not in self.peers and not self._may_live(session):
                self._runtime.session_lock_path(session).unlink(missing_ok=True)
                self._unlocked.discard(session)
            elif not self._runtime.session_lock_path(session).exists():
                self._unlocked.discard(session)

    # -- events

    def accept(self, connection: Connection) -> None:
        """Take up a connection; it is nobody's until its Hello. Of too many such ones the oldest goes."""
        self._connections[connection.fileno()] = self._silent[connection.fileno()] = connection
        self.epoll.register(connection.fileno(), select.EPOLLIN)
        if len(self._silent) > limits.SILENT_CONNECTIONS_MAX:
            oldest = next(iter(self._silent.values()))
            log.warning(Line("connection closed: too many have not said Hello", pid=oldest.pid))
            self._close(oldest)

    def dispatch(self) -> None:
        """Handle what sockets and pidfds report, without waiting."""
        self._closed.clear()
        for fd, _ in self.epoll.poll(0):
            if fd in self._closed:
                continue
            if fd in self._pidfds:
                self._end(self._pidfds[fd])
            elif fd in self._connections:
                self._read(self._connections[fd])

    def _read(self, connection: Connection) -> None:
        try:
            received = connection.receive()
        except BlockingIOError:
            return
        except RemoteProtocolError as error:
            self._hang_up(connection, 0, Refusal(ErrorCode.MALFORMED, str(error)))
            return
        except OSError as error:  # a process that was killed with messages unread resets its connection
            log.debug(Line("session socket lost", pid=connection.pid, error=str(error)))
            received = None
        if received is None:
            self._close(connection)
            return
        self._silent.pop(connection.fileno(), None)
        message, fds = received
        seq = getattr(message, "seq", 0)
        try:
            self._handle(connection, message, fds)
        except Refusal as refusal:
            if connection.session:
                self._send(connection, protocol.Refused(seq, refusal.code, str(refusal)))
            else:
                self._hang_up(connection, seq, refusal)

    def _handle(self, connection: Connection, message: protocol.FromClient, fds: list[int]) -> None:
        if isinstance(message, protocol.Hello):
            self._hello(connection, message, fds)
            return
        peer = self.peers.get(connection.session)
        if peer is None or peer.connection is not connection:
            close_all(fds)
            raise Refusal(ErrorCode.FOREIGN, "the first message of a connection is Hello")
        if isinstance(message, protocol.Attach):
            self._attach(peer, connection, message, fds)
            return
        close_all(fds)
        if isinstance(message, protocol.Open):
            self._open(peer, connection, message)
        elif isinstance(message, protocol.Detach):
            self._detach(peer, message)
        elif isinstance(message, protocol.Unmapped):
            peer.mapped.discard(message.segment)
            self._unmapped(peer.session, message.segment)
        else:
            peer.connection = None  # else it would be closed before it is answered
            self._end(peer.session)
            self._send(connection, protocol.Ended())
            self._close(connection)

    # -- life of a session

    def _hello(self, connection: Connection, hello: protocol.Hello, fds: list[int]) -> None:
        try:
            self._admit(connection, hello)
        except Refusal:
            close_all(fds)
            raise
        pidfd = verify_pidfd(fds, connection.pid)
        directory = self._directory
        known = hello.session in directory.rights.sessions
        resumed = known and hello.lineage == directory.table.lineage
        if known and not resumed:
            self._end(hello.session)
        old = self.peers.get(hello.session)
        if old is not None:
            self._forget_peer(old)
        name = hello.name.encode()[: limits.LABEL_BYTES_MAX].decode(errors="ignore")
        peer = Peer(hello.session, name, connection.pid, pidfd, connection)
        if resumed:
            peer.mapped = set(directory.allocator.rooms) | set(self._endings)
        self.peers[hello.session] = peer
        connection.session = hello.session
        self._pidfds[pidfd] = hello.session
        self.epoll.register(pidfd, select.EPOLLIN)
        note(self._runtime.session_lock_path(hello.session), connection.pid)
        directory.rights.of(hello.session)
        replays = self._requests.sessions.get(hello.session)
        credentials = Credentials(secrets.token_bytes(limits.TOKEN_BYTES))
        if resumed and replays is not None:
            credentials.replays = replays.replays
        self._requests.sessions[hello.session] = credentials
        welcome = protocol.Welcome(
            protocol.PROTOCOL_VERSION,
            self._requests.epoch,
            directory.table.lineage,
            credentials.token,
            resumed,
            os.getpid(),
        )
        self._send(connection, welcome, [self._table_fd()])
        if resumed:
            for number, ending in self._endings.items():
                if peer.session in ending.importers:
                    self._send(connection, protocol.Gone(number))
        log.info(
            Line("session began", session=f"{peer.session:016x}", pid=peer.pid, name=name, resumed=resumed)
        )

    def _admit(self, connection: Connection, hello: protocol.Hello) -> None:
        if hello.version != protocol.PROTOCOL_VERSION:
            ours = protocol.PROTOCOL_VERSION
            raise Refusal(
                ErrorCode.VERSION, f"got protocol version {hello.version}, this server speaks {ours}"
            )
        if self._requests.draining or self._requests.usurped:
            raise Refusal(ErrorCode.DRAINING, "the server is ending")
        if connection.session or not 0 < hello.session < 1 << 63:
            raise Refusal(ErrorCode.ARGUMENT, "hello: wanted once, with a session of 1 to 63 bits")
        if connection.uid not in (0, os.geteuid()) and self._runtime.group is None:
            raise Refusal(
                ErrorCode.FOREIGN, f"user {connection.uid} may not use the pool of user {os.geteuid()}"
            )
        if len(self.peers) >= limits.SESSIONS_MAX:
            raise Refusal(ErrorCode.LIMIT, f"{limits.SESSIONS_MAX} sessions are there already")
        try:
            holder = lock_holder(self._runtime.session_lock_path(hello.session))
        except ConfigError as error:
            raise Refusal(ErrorCode.INTERNAL, str(error)) from error
        if holder is None or (holder and connection.pid and holder != connection.pid):
            path = self._runtime.session_lock_path(hello.session)
            raise Refusal(ErrorCode.FOREIGN, f"hello: wanted the lock {path} held by the sender")

    def _end(self, session: int) -> None:
        """The process is gone (or said Bye): everything of it is freed, its segments end."""
        peer = self.peers.get(session)
        if peer is not None:
            self._forget_peer(peer)
            log.info(Line("session ended", session=f"{session:016x}", pid=peer.pid, name=peer.name))
        self._requests.sessions.pop(session, None)
        self._directory.end_session(session)
        segments = self._directory.table.segments
        for slot in range(limits.SEGMENTS_MAX):
            number = self._directory.table.segment_in_use(slot)
            if number and int(segments["session"][slot]) == session:
                self._end_segment(number, 0, 0)
        for number in list(self._endings):
            self._unmapped(session, number)
        self._unlocked.add(session)
        self._remove_locks()

    def _forget_peer(self, peer: Peer) -> None:
        del self.peers[peer.session]
        self.epoll.unregister(peer.pidfd)
        del self._pidfds[peer.pidfd]
        self._closed.add(peer.pidfd)
        os.close(peer.pidfd)
        if peer.connection is not None:
            self._close(peer.connection)

    # -- segments

    def _attach(self, peer: Peer, connection: Connection, attach: protocol.Attach, fds: list[int]) -> None:
        device = attach.device.encode()
        sizes_fit = 0 < attach.data_offset < attach.size < 1 << 48 and 0 <= attach.rank < 16
        sizes_fit = sizes_fit and -1 <= attach.numa < 1 << 16
        if (
            len(fds) > 1
            or len(attach.segment_id) != 16
            or not 0 < attach.incarnation < 1 << 64
            or not sizes_fit
        ):
            close_all(fds)
            raise Refusal(
                ErrorCode.ARGUMENT, "attach: wanted an id of 16 bytes, an incarnation, a size and one memfd"
            )
        if (
            len(device) > 64
            or b"\0" in device
            or len(attach.descriptor) > limits.SEGMENT_DESCRIPTOR_BYTES_MAX
        ):
            close_all(fds)
            raise Refusal(ErrorCode.ARGUMENT, "attach: device or descriptor is too long")
        try:
            number = self._directory.add_segment(peer.session, attach)
        except Refusal:
            close_all(fds)
            raise
        old = self.lent.get(number)
        if old is not None:
            close_all(old.fds)
        self.lent[number] = Lent(attach.descriptor, fds, peer.session)
        log.info(Line("segment lent", segment=number, device=attach.device, bytes=attach.size, pid=peer.pid))
        self._send(connection, protocol.Attached(attach.seq, number))

    def _open(self, peer: Peer, connection: Connection, message: protocol.Open) -> None:
        lent = self.lent.get(message.segment)
        if lent is None:
            raise Refusal(
                ErrorCode.GONE, f"segment {message.segment} is not there, or its holder has not come back"
            )
        peer.mapped.add(message.segment)
        self._send(connection, protocol.Opened(message.seq, message.segment, lent.descriptor), lent.fds)

    def _detach(self, peer: Peer, message: protocol.Detach) -> None:
        lent = self.lent.get(message.segment)
        if lent is None or lent.session != peer.session:
            raise Refusal(ErrorCode.FOREIGN, f"segment {message.segment} is not lent by this session")
        self._end_segment(message.segment, peer.session, message.seq)

    def _end_segment(self, number: int, holder: int, seq: int) -> None:
        """The incarnation ends: no grants from it any more; whoever maps it is told, and the holder when all
        have unmapped.
        """
        self._directory.drop_segment(number)
        lent = self.lent.pop(number, None)
        if lent is not None:
            close_all(lent.fds)
        importers = {peer.session for peer in self.peers.values() if number in peer.mapped} | self.awaited()
        importers.discard(holder)
        self._endings[number] = Ending(importers, holder, seq)
        log.info(Line("segment ended", segment=number, importers=len(importers)))
        for session in list(importers):
            peer = self.peers.get(session)
            if peer is not None and peer.connection is not None:
                self._send(peer.connection, protocol.Gone(number))
        self._unmapped(0, number)

    def _unmapped(self, session: int, number: int) -> None:
        ending = self._endings.get(number)
        if ending is None:
            return
        ending.importers.discard(session)
        if ending.importers:
            return
        del self._endings[number]
        holder = self.peers.get(ending.holder)
        if holder is not None and holder.connection is not None:
            self._send(holder.connection, protocol.Detached(ending.seq, number))

    def call(self) -> None:
        """Tell those for whom the directory has offers; who has no connection now asks when it comes back."""
        called = self._directory.called
        while called:
            peer = self.peers.get(called.pop())
            if peer is not None and peer.connection is not None:
                self._send(peer.connection, protocol.Offering())

    # -- sockets

    def _send(
        self, connection: Connection, message: protocol.FromServer, fds: list[int] | None = None
    ) -> None:
        """Send, or hang up on a peer that does not read: it comes back and learns the rest."""
        try:
            connection.send(message, fds or ())
        except OSError as error:
            log.debug(Line("session socket closed", pid=connection.pid, error=str(error)))
            self._close(connection)

    def _hang_up(self, connection: Connection, seq: int, refusal: Refusal) -> None:
        log.warning(Line("connection refused", pid=connection.pid, code=refusal.code, reason=str(refusal)))
        self._send(connection, protocol.Refused(seq, refusal.code, str(refusal)))
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        fd = connection.fileno()
        if fd < 0:
            return
        self.epoll.unregister(fd)
        del self._connections[fd]
        self._silent.pop(fd, None)
        self._closed.add(fd)
        connection.close()
        peer = self.peers.get(connection.session)
        if peer is not None and peer.connection is connection:
            peer.connection = None

    def close(self) -> None:
        """Close everything; sessions are not ended: the next server goes on with them."""
        for connection in list(self._connections.values()):
            self._close(connection)
        for pidfd in self._pidfds:
            os.close(pidfd)
        for lent in self.lent.values():
            close_all(lent.fds)
        self.epoll.close()
