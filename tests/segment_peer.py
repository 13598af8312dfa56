"""A second process for tests of segments: maps what it is sent and does what it is told, line by line.

Run with the number of a socket's descriptor; see `Peer`, which starts it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from vcache.errors import VCacheError
from vcache.segment import Borrow, MappedSegment, Segment, decode_descriptor, map_segment

MESSAGE_BYTES = 4096


class Peer:
    """Another process, and what it can be told. An error that it meets comes back as its class's name.

    environment: what its own has beside, or instead of, ours.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(60)
        command = [sys.executable, "-m", "tests.segment_peer", str(theirs.fileno())]
        root = Path(__file__).parent.parent
        given = None if environment is None else {**os.environ, **environment}
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=root, env=given)
        theirs.close()

    def map(self, segment: Segment) -> str:
        """Send it the segment to map."""
        encoded, fd = segment.descriptor()
        return self.map_encoded(encoded, fd)

    def map_encoded(self, encoded: bytes, fd: int | None) -> str:
        """Send it any descriptor and file to map."""
        socket.send_fds(self._socket, [b"map " + encoded], [] if fd is None else [fd])
        return self._answer()

    def map_for_reading(self, segment: Segment) -> str:
        """Send it the segment to map without the right to write."""
        encoded, fd = segment.descriptor()
        socket.send_fds(self._socket, [b"rom " + encoded], [] if fd is None else [fd])
        return self._answer()

    def ask(self, command: str) -> str:
        """Have it do something: see `serve`."""
        self._socket.send(command.encode())
        return self._answer()

    def _answer(self) -> str:
        return self._socket.recv(MESSAGE_BYTES).decode()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self.process.wait(60)


def do(mapped: MappedSegment | None, borrows: list[Borrow], words: list[str]) -> str:
    """Carry out one command on the mapped segment; `borrows` are those that are out."""
    assert mapped is not None
    match words:
        case ["borrow"]:
            borrow = mapped.borrow()
            if borrow is not None:
                borrows.append(borrow)
            return str(borrow is not None)
        case ["release"]:
            borrows.pop().release()
            return str(mapped.gone)
        case ["writable"]:
            return str(mapped.writable)
        case ["peek", offset, length]:
            return mapped.peek(int(offset), int(length)).hex()
        case ["poke", offset, content]:
            mapped.poke(int(offset), bytes.fromhex(content))
            return "done"
        case ["read", offset, length]:
            return bytes(mapped.view(int(offset), int(length)).cpu().numpy()).hex()
        case ["fill", offset, length, byte]:
            view = mapped.view(int(offset), int(length))
            view.fill_(int(byte))
            view.cpu()  # on a GPU: until it has really happened
            return "done"
        case ["incarnation"]:
            return str(mapped.incarnation_now())
        case ["retire"]:
            mapped.retire()
            return str(mapped.gone)
        case _:
            raise AssertionError(words)


def serve(number: int) -> None:
    """Answer messages until the other end closes."""
    mapped: MappedSegment | None = None
    borrows: list[Borrow] = []
    with socket.socket(fileno=number) as connection:
        while True:
            message, fds, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 1)
            if not message:
                return
            try:
                if message[:4] in (b"map ", b"rom "):
                    descriptor, fd = decode_descriptor(message[4:]), fds[0] if fds else None
                    mapped = map_segment(descriptor, fd, writable=message.startswith(b"map "))
                    answer = mapped.device
                else:
                    answer = do(mapped, borrows, message.decode().split())
            except (VCacheError, RuntimeError) as error:  # RuntimeError: torch's, on a GPU
                answer = f"{type(error).__name__}: {error}"
            finally:
                for fd in fds:
                    os.close(fd)
            connection.send(answer.encode())


if __name__ == "__main__":
    serve(int(sys.argv[1]))
