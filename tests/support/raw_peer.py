"""A client that says whatever it is told to, over the real sockets of a real server: well-behaved or not."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import zmq

from vcache import protocol
from vcache.limits import FINGERPRINT_BYTES, NAMESPACE_BYTES
from vcache.protocol import Answer, FromClient, FromServer, Reply, Request, Welcome
from vcache.runtime import OwnerLock, RuntimeDir

DEADLINE_S = 20.0
LAYOUT = b"R" * FINGERPRINT_BYTES
NAMESPACE = b"R" * NAMESPACE_BYTES

R = TypeVar("R", bound=Reply)
S = TypeVar("S", bound=FromServer)


class RawConnection:
    """A connection to the session socket, with nothing said yet."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.socket.connect(str(path))  # blocking: a full backlog is waited for
        except OSError:
            self.socket.close()
            raise
        self.socket.settimeout(DEADLINE_S)

    def send(self, packet: bytes | FromClient, fds: Sequence[int] = ()) -> None:
        """Send one packet; a message is encoded first."""
        raw = packet if isinstance(packet, bytes) else protocol.encode(packet)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        self.socket.sendmsg([raw], rights)

    def receive(self, kind: type[S]) -> S:
        """The next message, which is of this kind; descriptors that come with it are closed."""
        packet, fds, _, _ = socket.recv_fds(self.socket, 1 << 16, 8)
        for fd in fds:
            os.close(fd)
        assert packet, f"the server hung up, wanted {kind.__name__}"
        message = protocol.decode_from_server(packet)
        assert isinstance(message, kind), message
        return message

    def hung_up(self) -> bool:
        """Wait for the end of the connection; False if a message comes instead."""
        try:
            return not self.socket.recv(1 << 16)
        except ConnectionResetError:  # what we had sent was not read
            return True

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


class RawChannel:
    """A DEALER socket at the server's ROUTER."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = self.socket.sndtimeo = int(DEADLINE_S * 1e3)
        self.socket.connect(endpoint)

    def exchange(self, *frames: bytes) -> tuple[Answer, Reply]:
        """Send these frames as one message and wait for an answer."""
        self.socket.send_multipart(frames)
        return self.receive()

    def receive(self) -> tuple[Answer, Reply]:
        """The next answer and what is in it."""
        answer = protocol.decode_answer(self.socket.recv())
        return answer, protocol.decode_reply(answer.body)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()
        self._context.term()


class RawPeer:
    """A whole session of this process: lock, greeting, requests. `with RawPeer(path) as peer:`"""

    def __init__(self, path: Path, session: int = 0) -> None:
        self.runtime = RuntimeDir.resolve(str(path))
        self.session = session or int.from_bytes(os.urandom(7), "little") + 1
        self.lock = OwnerLock(self.runtime.session_lock_path(self.session))
        self.connection = RawConnection(self.runtime.session_path)
        self.channel = RawChannel(self.runtime.rpc_endpoint)
        self.welcome = Welcome(0, 0, 0, b"", False, 0)
        self.last_rid = 0

    def __enter__(self) -> RawPeer:
        assert self.lock.try_acquire()
        self.greet()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def greet(self, **instead: object) -> None:
        """Say Hello as one should, but for the fields given."""
        fields = {"version": protocol.PROTOCOL_VERSION, "session": self.session, "lineage": 0, "name": "raw"}
        pidfd = os.pidfd_open(os.getpid())
        try:
            self.connection.send(protocol.Hello(**{**fields, **instead}), [pidfd])  # type: ignore[arg-type]
        finally:
            os.close(pidfd)
        self.welcome = self.connection.receive(Welcome)

    def reconnect(self) -> None:
        """Drop the session's socket, come back to whoever listens now, and go on."""
        self.connection.close()
        self.connection = RawConnection(self.runtime.session_path)
        self.greet(lineage=self.welcome.lineage)

    def come_back(self) -> None:
        """Begin anew with the server that is there now, which is another one."""
        self.channel.close()
        self.channel = RawChannel(self.runtime.rpc_endpoint)
        self.reconnect()

    def frame(self, request: Request, rid: int = 0, **instead: object) -> bytes:
        """The frame of a request; rid 0: the next one."""
        self.last_rid = rid or self.last_rid + 1
        fields = {"session": self.session, "token": self.welcome.token, "epoch": self.welcome.epoch}
        return protocol.encode_request(request, rid=self.last_rid, **{**fields, **instead})  # type: ignore[arg-type]

    def ask(self, request: Request, kind: type[R], rid: int = 0) -> R:
        """Make a request and return its answer, which is of this kind."""
        answer, reply = self.channel.exchange(self.frame(request, rid))
        assert isinstance(reply, kind), reply
        assert answer.rid == self.last_rid
        return reply

    def pong(self) -> bool:
        """Whether a ping is answered; answers to what was sent before are passed over."""
        self.channel.socket.send(self.frame(protocol.Ping()))
        while True:
            answer, reply = self.channel.receive()
            if answer.rid == self.last_rid:
                return isinstance(reply, protocol.Pong)

    def refused(self, request: Request, rid: int = 0) -> protocol.Error:
        """Make a request that is refused."""
        return self.ask(request, protocol.Error, rid)

    # -- requests in short

    def lend(self, size: int) -> int:
        """Lend a segment with room for `size` bytes of extents (of which there is no memory); its number."""
        offset = 4096
        self.connection.send(protocol.Attach(1, b"", os.urandom(16), 1, "shm:0", offset + size, offset))
        return self.connection.receive(protocol.Attached).segment

    def reserve(self, *keys: bytes, count: int = 0, size: int = 4096) -> protocol.Extents:
        """The extents granted."""
        request = protocol.Reserve(LAYOUT, size, b"".join(keys), count)
        return protocol.unpack(self.ask(request, protocol.Reserved).extents, protocol.EXTENT)

    def commit(self, extents: protocol.Extents, keys: Sequence[bytes]) -> bytes:
        """The outcomes of binding these keys to whole extents."""
        lengths = extents["length"].astype("<u8").tobytes()
        request = protocol.Commit(self.handles(extents), b"".join(keys), lengths, NAMESPACE)
        return self.ask(request, protocol.Committed).outcomes

    @staticmethod
    def handles(extents: protocol.Extents) -> bytes:
        """Extents as their owner names them."""
        return protocol.pack_handles(extents["index"], extents["generation"])

    def close(self) -> None:
        """End the session in order."""
        try:
            self.connection.send(protocol.Bye())
            self.connection.receive(protocol.Ended)
            assert self.connection.hung_up()
        finally:
            self.connection.close()
            self.channel.close()
            self.lock.release(remove=True)
