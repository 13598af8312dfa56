"""One client's end of the session socket: packets with descriptors, the sender's credentials, its pidfd."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from metadata_server.errors import Refusal
from vcache import protocol
from vcache.protocol import ErrorCode

_PACKET_BYTES: Final = 64 << 10
_DESCRIPTORS_MAX: Final = 4
_CREDENTIALS: Final = struct.Struct("iII")


class Connection:
    """A connected session socket; non-blocking. Descriptors that arrive are the reader's to close."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid, self.uid, self.gid = _CREDENTIALS.unpack(raw)
        self.session = 0

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self.sock.fileno()

    def receive(self) -> tuple[protocol.FromClient, list[int]] | None:
        """The next message and its descriptors; None at the end. Raises BlockingIOError, RemoteProtocolError,
        OSError.
        """
        packet, ancillary, _, _ = self.sock.recvmsg(_PACKET_BYTES, socket.CMSG_SPACE(_DESCRIPTORS_MAX * 4))
        fds = _descriptors(ancillary)
        if not packet:
            close_all(fds)
            return None
        try:
            return protocol.decode_from_client(packet), fds
        except BaseException:
            close_all(fds)
            raise

    def send(self, message: protocol.FromServer, fds: Sequence[int] = ()) -> None:
        """Send one message with copies of `fds`. Raises OSError, also if the peer does not read (it must
        reconnect).
        """
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        self.sock.sendmsg([protocol.encode(message)], ancillary)

    def close(self) -> None:
        """Close the socket; the session may go on."""
        self.sock.close()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return fds.tolist()


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)


def verify_pidfd(fds: list[int], pid: int) -> int:
    """The one descriptor, if it is a pidfd of process `pid`. Raises Refusal and closes them all otherwise."""
    if len(fds) == 1:
        try:
            told = _pid_of(fds[0])
        except BaseException:
            close_all(fds)
            raise
        # Another PID namespace's process has no number here that could be compared.
        if told is not None and (told == pid or pid == 0 or told <= 0):
            return fds[0]
    close_all(fds)
    raise Refusal(ErrorCode.ARGUMENT, f"hello: wanted one descriptor, a pidfd of process {pid}")


def _pid_of(pidfd: int) -> int | None:
    try:
        lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
    except OSError as error:  # no descriptors are left
        raise Refusal(ErrorCode.INTERNAL, f"hello: the pidfd cannot be looked at: {error}") from error
    for line in lines:
        if line.startswith("Pid:"):
            return int(line.split()[1])
    return None
