"""The session's Unix socket: messages with descriptors, sent and received by one thread without ever blocking
it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from vcache.errors import RemoteProtocolError, Unavailable
from vcache.limits import SESSION_PACKET_BYTES_MAX
from vcache.protocol import (
    Ended,
    FromClient,
    FromServer,
    Hello,
    Refused,
    Welcome,
    decode_from_server,
    encode,
)

Received = tuple[FromServer, list[int]]
"""A message, and the descriptors that came with it: the receiver's to close."""

_DESCRIPTORS_MAX = 4
_RECEIVED_PER_TURN_MAX = 256


class ServerAbsent(Unavailable):
    """Nobody listens at the session socket."""


class SessionRefused(Unavailable):
    """The server answered Hello with a refusal. code: an ErrorCode."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(f"the metadata server refused the session: {message} ({code})")


class Wire:
    """One connection. `post` may be called by any thread; everything else belongs to the session's thread."""

    def __init__(self, connected: socket.socket, on_post: Callable[[], None]) -> None:
        self._socket = connected
        self._on_post = on_post
        self._outbox: deque[tuple[bytes, tuple[int, ...]]] = deque()

    @classmethod
    def dial(cls, path: Path, on_post: Callable[[], None]) -> Wire:
        """Connect. Raises ServerAbsent if nobody listens there, Unavailable."""
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        unix.setblocking(False)
        try:
            unix.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            unix.close()
            raise ServerAbsent(f"no metadata server listens at {path}") from error
        except OSError as error:  # EAGAIN: its backlog is full
            unix.close()
            raise Unavailable(f"the metadata server's socket {path}: {error.strerror}") from error
        return cls(unix, on_post)

    def fileno(self) -> int:
        """For poll."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def greet(self, hello: Hello) -> None:
        """Send Hello with a pidfd of this process. Raises Unavailable."""
        pidfd = os.pidfd_open(os.getpid())
        try:
            socket.send_fds(self._socket, [encode(hello)], [pidfd])
        except OSError as error:
            raise Unavailable(f"the metadata server did not take the greeting: {error.strerror}") from error
        finally:
            os.close(pidfd)

    def welcomed(self) -> tuple[Welcome, int] | None:
        """The server's answer to the greeting and the table's descriptor; None if it is not there yet.

        Raises SessionRefused, Unavailable if the connection has ended, RemoteProtocolError.
        """
        received = self._receive_one()
        if received is None:
            return None
        message, descriptors = received
        if isinstance(message, Welcome) and len(descriptors) == 1:
            return message, descriptors[0]
        close_all(descriptors)
        if isinstance(message, Refused):
            raise SessionRefused(message.code, message.message)
        raise RemoteProtocolError(
            f"session: got {type(message).__name__} with {len(descriptors)} descriptors, wanted Welcome"
        )

    def post(self, message: FromClient, descriptors: Sequence[int] = ()) -> None:
        """Have a message sent by the session's thread, soon; its descriptors stay open until then."""
        self._outbox.append((encode(message), tuple(descriptors)))
        self._on_post()

    @property
    def has_unsent(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._outbox)

    def flush(self) -> None:
        """Send what was posted, as far as the socket takes it now. Raises Unavailable if the connection has
        ended.
        """
        while self._outbox:
            packet, descriptors = self._outbox[0]
            try:
                socket.send_fds(self._socket, [packet], descriptors)
            except BlockingIOError:
                return
            except OSError as error:
                raise Unavailable(f"the metadata server closed the session ({error.strerror})") from error
            self._outbox.popleft()

    def receive(self) -> list[Received]:
        """What has arrived. Raises Unavailable if the connection has ended, RemoteProtocolError."""
        arrived: list[Received] = []
        try:
            while len(arrived) < _RECEIVED_PER_TURN_MAX and (received := self._receive_one()) is not None:
                arrived.append(received)
        except BaseException:
            for _, descriptors in arrived:
                close_all(descriptors)
            raise
        return arrived

    def ended(self) -> bool:
        """Whether the server has answered `Bye`; what arrived before is dropped. Raises as `receive`."""
        while (received := self._receive_one()) is not None:
            close_all(received[1])
            if isinstance(received[0], Ended):
                return True
        return False

    def _receive_one(self) -> Received | None:
        try:
            packet, descriptors, flags, _ = socket.recv_fds(
                self._socket, SESSION_PACKET_BYTES_MAX, _DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except OSError as error:
            raise Unavailable(f"the session was lost ({error.strerror})") from error
        try:
            if not packet:
                raise Unavailable("the metadata server ended the session")
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise RemoteProtocolError(f"session: a message longer than {SESSION_PACKET_BYTES_MAX} bytes")
            return decode_from_server(packet), list(descriptors)
        except BaseException:
            close_all(descriptors)
            raise


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors that came with a message."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # it is closed in any case (close(2))
            os.close(descriptor)
