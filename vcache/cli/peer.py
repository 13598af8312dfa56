"""A second process that maps segments for the doctor: compares bytes, writes others, measures.

    python -m vcache.cli.peer FD

answers `Probe` by `Probed` over the SOCK_SEQPACKET socket FD until the other end closes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from vcache.errors import SegmentError, VCacheError
from vcache.limits import MIB
from vcache.segment import DATA_OFFSET, MappedSegment, Segment, decode_descriptor, map_segment

if TYPE_CHECKING:
    import torch

COMPARED_BYTES: Final = 2 * MIB - DATA_OFFSET
"""What is written and compared in each direction."""

_MESSAGE_BYTES: Final = 8192
_ANSWER_S: Final = 120.0
"""For one answer: the first one waits for torch to be imported, on a GPU for a context too."""

_ROUNDS: Final = 5

_COPIES_ON_GPU: Final = 8
"""One after the other before anybody waits: over NVLink a single one takes hardly longer than the waiting."""


class Probe(msgspec.Struct, frozen=True):
    """Map this segment, compare its first bytes with pattern `seed`, overwrite them with pattern `seed` + 1.

    own_device: the GPU to map with. measured_bytes: how much to read and write for the bandwidth; 0: nothing.
    """

    descriptor: bytes
    seed: int
    own_device: str | None = None
    measured_bytes: int = 0


class Probed(msgspec.Struct, frozen=True):
    """error: what went wrong, empty if nothing. gbytes_per_s: read by copies into the peer's own memory.

    written_gbytes_per_s: the other way. opened_ms: for mapping the segment, its header's check included.
    """

    error: str
    gbytes_per_s: float = 0.0
    written_gbytes_per_s: float = 0.0
    opened_ms: float = 0.0


class Peer:
    """The process, as the doctor sees it. Raises SegmentError when it does not answer."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_ANSWER_S)
        number = theirs.fileno()
        command = [sys.executable, "-m", "vcache.cli.peer", str(number)]
        self._process = subprocess.Popen(command, pass_fds=[number], stdin=subprocess.DEVNULL)
        theirs.close()

    def probe(
        self, segment: Segment, seed: int, *, own_device: str | None = None, measured_bytes: int = 0
    ) -> Probed:
        """Have it map our segment, whose first bytes are pattern `seed`; afterwards pattern `seed` + 1."""
        encoded, fd = segment.descriptor()
        message = msgspec.msgpack.encode(Probe(encoded, seed, own_device, measured_bytes))
        try:
            socket.send_fds(self._socket, [message], [] if fd is None else [fd])
            answer = self._socket.recv(_MESSAGE_BYTES)
        except OSError as error:
            # It ends before our segment does: freeing GPU memory that somebody has mapped is undefined.
            self._process.kill()
            self._process.wait()
            raise SegmentError(f"the second process does not answer: {error}") from error
        if not answer:
            raise SegmentError(f"the second process ended with exit code {self._process.wait(_ANSWER_S)}")
        return msgspec.msgpack.decode(answer, type=Probed)

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        try:
            self._process.wait(_ANSWER_S if kind is None else 1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def pattern(seed: int) -> torch.Tensor:
    """COMPARED_BYTES that nothing else writes by chance, as a uint8 tensor."""
    import torch

    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, COMPARED_BYTES, np.uint8))


def is_pattern(view: torch.Tensor, seed: int) -> bool:
    """Whether these bytes are `pattern(seed)`."""
    import torch

    return torch.equal(view.cpu(), pattern(seed))


def _answer(probe: Probe, fd: int | None) -> Probed:
    try:
        begin_s = time.perf_counter()
        mapped = map_segment(decode_descriptor(probe.descriptor), fd, own_device=probe.own_device)
        opened_ms = (time.perf_counter() - begin_s) * 1e3
        borrow = mapped.borrow()
        if borrow is None:
            return Probed("the segment was gone when it had been mapped")
        with borrow:
            answer = msgspec.structs.replace(_compare(mapped, probe), opened_ms=opened_ms)
        mapped.retire()
    except (VCacheError, RuntimeError, ImportError) as error:  # RuntimeError: torch's, on a GPU
        return Probed(f"{type(error).__name__}: {error}")
    return answer


def _compare(mapped: MappedSegment, probe: Probe) -> Probed:
    view = mapped.view(DATA_OFFSET, COMPARED_BYTES)
    if not is_pattern(view, probe.seed):
        return Probed("the second process reads other bytes than were written")
    view.copy_(pattern(probe.seed + 1))
    _finish(view)
    if not probe.measured_bytes:
        return Probed("")
    import torch

    segment = mapped.view(DATA_OFFSET, probe.measured_bytes)
    own = torch.empty_like(segment, device=probe.own_device or "cpu")
    read = _bandwidth(own, segment)
    # What was read is written back, so the bytes that the other end compares stay as they are.
    return Probed("", read, _bandwidth(segment, own))


def _bandwidth(to: torch.Tensor, source: torch.Tensor) -> float:
    """GB/s of copies, the best of some rounds."""
    copies = _COPIES_ON_GPU if source.is_cuda else 1
    seconds = []
    for _ in range(_ROUNDS + 1):
        begin = time.perf_counter()
        for _ in range(copies):
            to.copy_(source)
        _finish(to)
        _finish(source)
        seconds.append(time.perf_counter() - begin)
    return copies * len(source) / min(seconds[1:]) / 1e9


def _finish(tensor: torch.Tensor) -> None:
    """Wait until what was launched on the tensor's GPU has finished."""
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize(tensor.device)


def serve(number: int) -> None:
    """Answer until the other end closes."""
    import torch  # noqa: F401  # it takes a second or two: now, while the other end imports it too

    with socket.socket(fileno=number) as connection:
        while True:
            message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 1)
            if not message:
                return
            try:
                probe = msgspec.msgpack.decode(message, type=Probe)
                answer = _answer(probe, descriptors[0] if descriptors else None)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            connection.send(msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
