"""A segment as its holder has it and as an importer has it: who may do what with the memory is in the type.

`Segment` allocates, exports and frees. `MappedSegment` does none of these: it maps a peer's and lets go of
it. Both give views, and both count the copies that run over them, so that memory is never taken away under
a copy.
"""

from __future__ import annotations

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from vcache.errors import ForkedProcess, RemoteProtocolError, SegmentError
from vcache.segment.header import DATA_OFFSET, SegmentDescriptor, encode_descriptor

if TYPE_CHECKING:
    import torch

    from vcache.segment.pinning import Registrar

_log = logging.getLogger(__name__)


class Borrow:
    """The right to touch a segment's memory until `release`; a context manager.

    It may be released in another thread than the one that borrowed, by whoever learns that the copy has
    finished. Releasing twice is harmless.
    """

    def __init__(self, memory: SegmentMemory) -> None:
        self._memory: SegmentMemory | None = memory
        self._guard = threading.Lock()

    def release(self) -> None:
        """The copy is over: its views must not be used any more. The last one unmaps a retired segment."""
        with self._guard:
            memory, self._memory = self._memory, None
        if memory is not None:
            memory._give_back()

    def __enter__(self) -> Borrow:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class SegmentMemory(ABC):
    """What holder and importer have in common: identity, views, borrows. Thread-safe.

    size: bytes, header included. device: the label by which all processes know it, "shm:0" or "cuda:GPU-…".
    segment_id: 16 bytes. incarnation: random, nonzero, of this allocation.

    A child that fork() made has none of this memory: there `borrow` gives None, and `view` raises
    ForkedProcess.
    """

    writable = True
    numa: int | None = None
    """The NUMA node that the memory is on or near, where this process, which allocated it, knows that."""

    def __init__(self, descriptor: SegmentDescriptor) -> None:
        self.size = descriptor.size
        self.device = descriptor.device
        self.segment_id = descriptor.segment_id
        self.incarnation = descriptor.incarnation
        self._descriptor = descriptor
        self._pid = os.getpid()
        self._state = threading.Condition(threading.Lock())
        self._borrows = 0
        self._ending = False
        self._gone = False
        self._tensor: torch.Tensor | None = None
        self._registered: Callable[[], None] | SegmentError | None = None

    def view(self, offset: int, length: int) -> torch.Tensor:
        """The bytes of one extent, as a 1-D uint8 tensor over the memory itself; no copy.

        **It must not outlive the borrow under which it was made**: afterwards the memory may be unmapped, and
        touching it ends the process. Raises RemoteProtocolError if the extent (which a peer named) is not
        within the segment's data, SegmentError if the memory is gone.
        """
        self._check_extent(offset, length)
        return self._all_of_it()[offset : offset + length]

    def views(self, places: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """As `view`, of many extents (offset, length) at a third of the time; raises if one is impossible."""
        distance = _distance(places)
        if distance is not None:  # all in one call, at half the time
            begin, length = places[0]
            self._check_extent(begin, length)
            self._check_extent(*places[-1])
            return list(self._all_of_it().as_strided((len(places), length), (distance, 1), begin).unbind())
        self._check_extent(min(offset for offset, _ in places), min(length for _, length in places))
        self._check_extent(*max(places, key=sum))
        whole = self._all_of_it()
        return [whole[offset : offset + length] for offset, length in places]

    def host_view(self, offset: int, length: int) -> memoryview | None:
        """As `view`, without torch, where it is host memory; None where it is not."""
        self._check_extent(offset, length)
        with self._state:
            self._check_there()
            return self._host(offset, length)

    def peek(self, offset: int, length: int) -> bytes:
        """A copy of some bytes of the data, for probes: slow, and without torch. Raises as `view` does."""
        self._check_extent(offset, length)
        with self._state:
            self._check_there()
            return self._copy_out(offset, length)

    def poke(self, offset: int, content: bytes) -> None:
        """Overwrite some bytes of the data, for probes: slow, and without torch. Raises as `view` does."""
        self._check_extent(offset, len(content))
        if not self.writable:
            raise SegmentError(f"segment {self.segment_id.hex()} is mapped read-only")
        with self._state:
            self._check_there()
            self._copy_in(offset, content)

    def borrow(self) -> Borrow | None:
        """Keep the memory where it is while a copy runs; None once the segment is retired or closed: a miss.

        borrow = segment.borrow()
        if borrow is None: ...  # count a miss
        with borrow: copy(segment.view(offset, length))
        """
        if self._forked:
            return None
        with self._state:
            if self._ending:
                return None
            self._borrows += 1
        return Borrow(self)

    def register(self, registrar: Registrar) -> None:
        """Have host memory registered, once, until it is unmapped; on a GPU there is nothing to do.

        Raises SegmentError if that failed, now or before, or if the memory is gone.
        """
        place = self._host_memory()
        if place is None or callable(self._registered):
            return
        with self._state:
            self._check_there()
            if self._registered is None:
                try:
                    self._registered = registrar(*place)
                except SegmentError as error:
                    self._registered = error
            if isinstance(self._registered, SegmentError):
                raise self._registered

    @property
    def borrows(self) -> int:
        """How many copies run now."""
        return self._borrows

    @property
    def gone(self) -> bool:
        """Whether the memory was unmapped (importer) or freed (holder)."""
        return self._gone

    def incarnation_now(self) -> int:
        """The incarnation that the header names now; 0 if it has ended or the memory is gone here.

        On shared memory the header is read anew. On a GPU that would be a copy over the bus: there it is the
        incarnation that was verified at mapping, and only the extent table's fence tells of its end.
        """
        if self._forked:
            return 0
        with self._state:
            return 0 if self._gone else self._read_incarnation()

    @property
    def _forked(self) -> bool:
        # Asked before the lock is taken: a thread of the parent may have held it when the child was made.
        return self._pid != os.getpid()

    def _check_extent(self, offset: int, length: int) -> None:
        if self._forked:
            raise ForkedProcess(f"segment {self.segment_id.hex()} was allocated or mapped before fork()")
        if offset < DATA_OFFSET or length <= 0 or offset + length > self.size:
            raise RemoteProtocolError(
                f"extent: got offset {offset} and length {length}, wanted {DATA_OFFSET} <= offset and "
                f"0 < length <= {self.size} - offset (segment {self.segment_id.hex()})"
            )

    def _check_there(self) -> None:
        """To be called under the lock."""
        if self._gone:
            raise SegmentError(f"segment {self.segment_id.hex()} is not mapped any more")

    def _all_of_it(self) -> torch.Tensor:
        whole = self._tensor
        if whole is not None:
            return whole
        with self._state:
            self._check_there()
            if self._tensor is None:
                import torch

                # It is kept: what an engine makes in inference mode nobody may write to outside of that.
                with torch.inference_mode(mode=False):
                    self._tensor = self._whole()
            return self._tensor

    def _give_back(self) -> None:
        if self._forked:
            return
        with self._state:
            assert self._borrows > 0
            self._borrows -= 1
            freed = self._free_if_idle()
        if freed:
            self._after_free()

    def _end(self) -> bool:
        """Grant no more borrows, and free the memory if none is out; True if that happened now."""
        with self._state:
            self._ending = True
            freed = self._free_if_idle()
        if freed:
            self._after_free()
        return freed

    def _free_if_idle(self) -> bool:
        if self._gone or not self._ending or self._borrows:
            return False
        self._gone = True
        self._tensor = None
        try:
            if callable(self._registered):
                self._registered()
            self._free()
        except SegmentError:
            # Nobody can handle it where a copy ends. Importers do not acknowledge, and die holding it.
            _log.exception("the memory of segment %s could not be given back", self.segment_id.hex())
            return False
        finally:
            self._state.notify_all()
        return True

    def _host_memory(self) -> tuple[int, int] | None:
        """Address and bytes of the mapping; None if it is no host memory."""
        return None

    @abstractmethod
    def _whole(self) -> torch.Tensor:
        """A uint8 tensor over all of the memory."""

    def _host(self, offset: int, length: int) -> memoryview | None:
        """Some of the bytes, if the CPU may touch them; called while the memory is there."""
        return None

    @abstractmethod
    def _copy_out(self, offset: int, length: int) -> bytes:
        """A copy of some bytes; called while the memory is there."""

    @abstractmethod
    def _copy_in(self, offset: int, content: bytes) -> None:
        """Overwrite some bytes; called while the memory is there."""

    @abstractmethod
    def _read_incarnation(self) -> int:
        """The incarnation in the header; called while the memory is there."""

    @abstractmethod
    def _free(self) -> None:
        """Unmap or free the memory; called once, with no borrow out."""

    @abstractmethod
    def _after_free(self) -> None:
        """Called once after `_free`, without the lock."""


class Segment(SegmentMemory):
    """A segment that this process holds: it allocated the memory, exports it, and frees it.

    importers_first: whether all importers must have unmapped it, or died, before `close` may free it.
    """

    importers_first = False

    def descriptor(self) -> tuple[bytes, int | None]:
        """The encoded SegmentDescriptor, and the descriptor to pass by SCM_RIGHTS (None if a handle does).

        The file descriptor stays the segment's: pass it on, do not close it. SegmentError once closed.
        """
        if self._forked:
            raise ForkedProcess(f"segment {self.segment_id.hex()} was allocated before fork()")
        if self._ending:
            raise SegmentError(f"segment {self.segment_id.hex()} is closed")
        return encode_descriptor(self._descriptor), self._fd()

    def close(self, *, wait_s: float = 0.0) -> bool:
        """End this incarnation and free the memory, when the last borrow has ended; True if it is freed now.

        wait_s: how long to wait for running copies. With `importers_first` close only when the server said
        that no importer maps the segment any more. May be called again.
        """
        if self._forked:
            return False
        with self._state:
            if not self._ending:
                self._ending = True
                self._end_incarnation()
        self._end()
        with self._state:
            return self._state.wait_for(lambda: self._gone, timeout=wait_s)

    def __enter__(self) -> Segment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _after_free(self) -> None:
        _log.debug("freed segment %s on %s", self.segment_id.hex(), self.device)

    @abstractmethod
    def _fd(self) -> int | None:
        """The file descriptor that importers need."""

    @abstractmethod
    def _end_incarnation(self) -> None:
        """Write into the header that the incarnation has ended; called once, while the memory is there."""


class MappedSegment(SegmentMemory):
    """A peer's segment, mapped here: this process neither allocated the memory nor frees it.

    writable: whether this process may write to it; a kernel that writes to one that is not faults.
    """

    def __init__(self, descriptor: SegmentDescriptor) -> None:
        super().__init__(descriptor)
        self._on_unmapped: list[Callable[[], None]] = []

    def retire(self, on_unmapped: Callable[[], None] | None = None) -> None:
        """Grant no more borrows and unmap, now or when the last borrow ends, in the thread where it ends.

        on_unmapped: called exactly once, after the memory is unmapped; what it raises is logged, since it may
        be called where a copy ends. `retire` may be called again: every callback is called once.
        """
        if self._forked:
            return
        with self._state:
            late = self._gone
            if on_unmapped is not None and not late:
                self._on_unmapped.append(on_unmapped)
        if late:
            self._call([on_unmapped] if on_unmapped is not None else [])
        else:
            self._end()

    def _after_free(self) -> None:
        with self._state:
            callbacks, self._on_unmapped = self._on_unmapped, []
        self._call(callbacks)

    def _call(self, callbacks: list[Callable[[], None]]) -> None:
        for callback in callbacks:
            try:
                callback()
            except Exception:
                _log.exception("after segment %s was unmapped", self.segment_id.hex())


def _distance(places: Sequence[tuple[int, int]]) -> int | None:
    """How far each place is behind the one before; None if that differs, or their lengths do."""
    if len(places) < 3:
        return None
    (begin, length), (second, _) = places[:2]
    distance = second - begin
    if distance < 0:
        return None
    for place in places:
        if place != (begin, length):
            return None
        begin += distance
    return distance
