"""Whether a second process can use a segment: it maps it, reads what is there, and writes something else.

    python -m vcache.segment.probe FD

answers one `_Question`, which comes over the SOCK_SEQPACKET socket FD with the segment's descriptor, by
`Probed`. torch is not needed.
"""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Final

import msgspec

from vcache.errors import SegmentError, VCacheError
from vcache.limits import CUDA_PROBE_S
from vcache.segment.base import Segment
from vcache.segment.header import DATA_OFFSET, decode_descriptor

_MESSAGE_BYTES: Final = 8192
_END_S: Final = 5.0
"""For a process whose socket has ended to end too."""

_OTHERS: Final = bytes(255 - byte for byte in range(256))
"""What the second process writes in place of what it read."""

_COMMAND: Final = (sys.executable, "-m", "vcache.segment.probe")


class _Question(msgspec.Struct, frozen=True):
    descriptor: bytes
    own_device: str | None


class Probed(msgspec.Struct, frozen=True):
    """What the second process says. error: what went wrong there, empty if nothing. digest: of what it read.
    writable: whether what it asked for as read-only could be written to.
    """

    error: str
    digest: bytes = b""
    writable: bool = True


def probe(
    segment: Segment,
    *,
    own_device: str | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = CUDA_PROBE_S,
    command: Sequence[str] = _COMMAND,
) -> Probed:
    """Have a new process use the segment, whose content is overwritten; it has ended when this returns.

    own_device: the process' own GPU, as it numbers them. environment: the process' own, beside what it needs
    to find this package. command: the process, but for the socket's number. Raises SegmentError, in words, if
    it does not see the right bytes, or its bytes are not seen here, in time.
    """
    length = segment.size - DATA_OFFSET
    written = os.urandom(length)
    segment.poke(DATA_OFFSET, written)
    encoded, fd = segment.descriptor()
    question = msgspec.msgpack.encode(_Question(encoded, own_device))
    surroundings = _environment(os.environ if environment is None else environment)
    probed = _ask(question, fd, command, surroundings, timeout_s)
    if probed.error:
        raise SegmentError(probed.error)
    if probed.digest != _digest(written):
        raise SegmentError("a second process read other bytes than were written")
    if segment.peek(DATA_OFFSET, length) != written.translate(_OTHERS):
        raise SegmentError("this process reads other bytes than a second one wrote")
    return probed


def _ask(
    question: bytes, fd: int | None, command: Sequence[str], environment: Mapping[str, str], timeout_s: float
) -> Probed:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, tempfile.TemporaryFile() as said:
        with theirs:
            number = theirs.fileno()
            child = subprocess.Popen(
                [*command, str(number)],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=environment,
            )
        try:
            answer = _exchange(ours, question, fd, timeout_s)
            if not answer:
                raise SegmentError(f"a second process ended with {_end_of(child)}{_last_line(said)}")
            return msgspec.msgpack.decode(answer, type=Probed)
        except TimeoutError as error:
            raise SegmentError(f"a second process gave no answer within {timeout_s:g} s") from error
        except msgspec.DecodeError as error:
            raise SegmentError(f"a second process answered nonsense: {error}") from error
        finally:
            # It ends before the segment does: memory that somebody has mapped may not be freed.
            child.kill()
            child.wait()


def _exchange(connection: socket.socket, question: bytes, fd: int | None, timeout_s: float) -> bytes:
    """The answer; empty if the other end has closed."""
    connection.settimeout(timeout_s)
    try:
        socket.send_fds(connection, [question], [] if fd is None else [fd])
        return connection.recv(_MESSAGE_BYTES)
    except (BrokenPipeError, ConnectionResetError):
        return b""


def _end_of(child: subprocess.Popen[bytes]) -> str:
    try:
        code = child.wait(_END_S)
    except subprocess.TimeoutExpired:
        return "its socket closed"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _last_line(said: IO[bytes]) -> str:
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    return f": {lines[-1].strip()}" if lines else ""


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    """With this package to be found first, from wherever it was imported."""
    home = str(Path(__file__).parents[2])
    inherited = given.get("PYTHONPATH")
    return {**given, "PYTHONPATH": os.pathsep.join([home, inherited] if inherited else [home])}


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


# -- in the second process


def _answer(question: _Question, fd: int | None) -> Probed:
    from vcache.segment import map_segment

    descriptor = decode_descriptor(question.descriptor)
    length = descriptor.size - DATA_OFFSET
    reading = map_segment(descriptor, fd, own_device=question.own_device, writable=False)
    seen, writable = reading.peek(DATA_OFFSET, length), reading.writable
    reading.retire()
    writing = map_segment(descriptor, fd, own_device=question.own_device)
    writing.poke(DATA_OFFSET, seen.translate(_OTHERS))
    writing.retire()
    return Probed("", _digest(seen), writable)


def serve(number: int) -> None:
    """Answer one question over the socket of this number."""
    with socket.socket(fileno=number) as connection:
        message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 1)
        try:
            question = msgspec.msgpack.decode(message, type=_Question)
            answer = _answer(question, descriptors[0] if descriptors else None)
        except VCacheError as error:
            answer = Probed(f"in a second process: {error}")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        connection.send(msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
