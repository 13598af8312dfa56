"""Segments in GPU memory. How it gets from process to process is one of two ways, both behind `Region`.

GPUs are known by UUID, since CUDA_VISIBLE_DEVICES renumbers them.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from vcache.errors import ArgumentError, RemoteProtocolError, SegmentError
from vcache.limits import MIB, SEGMENT_ALIGN_BYTES
from vcache.room import gpu_numa_node
from vcache.segment import ipc, vmm
from vcache.segment.base import MappedSegment, Segment
from vcache.segment.cuda_errors import Way
from vcache.segment.gpu import device_count, device_label, own_ordinal
from vcache.segment.header import (
    HEADER_BYTES,
    SegmentDescriptor,
    new_incarnation,
    new_segment_id,
    pack_header,
    verify_header,
)
from vcache.segment.region import Region
from vcache.segment.ways import best_way

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


class _Sharing(Protocol):
    """What each way can do."""

    def allocate(self, ordinal: int, size: int, /) -> tuple[Region, bytes, int | None]:
        """Memory on a GPU; the handle and the file descriptor that importers need."""

    def open_peer(
        self, descriptor: SegmentDescriptor, fd: int | None, ordinal: int, /, *, writable: bool
    ) -> Region:
        """A peer's memory, opened with GPU `ordinal`."""


_SHARING: Final[dict[Way, _Sharing]] = {Way.FD: vmm, Way.IPC: ipc}

_Mapping = tuple[bytes, int, bool]
"""Segment id, incarnation, whether writable."""


@dataclass
class _Opened:
    """A peer's memory that this process has open: at most once, however many map it."""

    region: Region
    users: int = 0


_guard = threading.Lock()
_opened: dict[_Mapping, _Opened] = {}
_held: set[tuple[bytes, int]] = set()
"""Segments of this process itself: their IPC handles cannot be opened here."""


class CudaSegment(Segment):
    """GPU memory that this process holds."""

    def __init__(self, descriptor: SegmentDescriptor, region: Region, fd: int | None) -> None:
        super().__init__(descriptor)
        self._region = region
        self._file = -1 if fd is None else fd
        # cudaFree under an importer is undefined; memory by file descriptor stays as long as anybody has it.
        self.importers_first = descriptor.kind == Way.IPC.value
        with _guard:
            _held.add((self.segment_id, self.incarnation))
        _all_held.add(self)

    @classmethod
    def allocate(
        cls, ordinal: int, size: int, *, numa: int | None = None, way: Way | None = None
    ) -> CudaSegment:
        """Allocate and export `size` bytes on GPU `ordinal`. Raises ArgumentError, SegmentError.

        way: how it is exported; by default the better one that works here, which the first call finds out.
        """
        if numa is not None:
            raise ArgumentError("numa", numa, "nothing: GPU memory lies on its GPU")
        if size <= 0 or size % SEGMENT_ALIGN_BYTES:
            raise ArgumentError(
                "size", size, f"a positive multiple of {SEGMENT_ALIGN_BYTES} (2 MiB) on a GPU"
            )
        count = device_count()
        if ordinal >= count:
            raise ArgumentError(
                "device", f"cuda:{ordinal}", f"a GPU that this process sees (it sees {count})"
            )
        label = device_label(f"cuda:{ordinal}")
        level = logging.INFO if way is None else logging.DEBUG
        if way is None:
            way = best_way(ordinal, label, cls.allocate)
        region, handle, fd = _SHARING[way].allocate(ordinal, size)
        descriptor = SegmentDescriptor(way.value, size, new_segment_id(), new_incarnation(), label, handle)
        made = cls(descriptor, region, fd)
        try:
            region.write(0, made._header(descriptor.incarnation))
        except BaseException:
            made.close()
            raise
        made.numa = gpu_numa_node(label)
        named = made.segment_id.hex(), size // MIB, ordinal, way.title
        _log.log(level, "allocated segment %s: %d MiB on cuda:%d, shared by %s", *named)
        return made

    def _header(self, incarnation: int) -> bytes:
        return pack_header(size=self.size, incarnation=incarnation, segment_id=self.segment_id)

    def _fd(self) -> int | None:
        return self._file if self._file >= 0 else None

    def _whole(self) -> torch.Tensor:
        return _tensor(self._region)

    def _read_incarnation(self) -> int:
        return self.incarnation

    def _end_incarnation(self) -> None:
        try:
            self._region.write(0, self._header(0))
        except SegmentError as error:  # a GPU that failed: the table's incarnation has ended all the same
            _log.error("the header of segment %s could not be ended: %s", self.segment_id.hex(), error)

    def _copy_out(self, offset: int, length: int) -> bytes:
        return self._region.read(offset, length)

    def _copy_in(self, offset: int, content: bytes) -> None:
        self._region.write(offset, content)

    def _free(self) -> None:
        with _guard:
            _held.discard((self.segment_id, self.incarnation))
        self._close_file()
        self._region.release()

    def _close_file(self) -> None:
        fd, self._file = self._file, -1
        if fd >= 0:
            os.close(fd)


class MappedCudaSegment(MappedSegment):
    """A peer's GPU memory, opened here."""

    def __init__(self, descriptor: SegmentDescriptor, mapping: _Mapping, region: Region) -> None:
        super().__init__(descriptor)
        self.writable = region.writable
        self._mapping = mapping
        self._region = region

    @classmethod
    def map(
        cls,
        descriptor: SegmentDescriptor,
        fd: int | None = None,
        own_device: str | None = None,
        *,
        writable: bool = True,
    ) -> MappedCudaSegment:
        """Open a peer's segment with the importer's own GPU current; `fd` stays the caller's.

        Raises RemoteProtocolError, SegmentError.
        """
        identity = descriptor.segment_id, descriptor.incarnation
        mapping = (*identity, writable)
        ordinal = own_ordinal(own_device)
        way = Way(descriptor.kind)
        with _guard:
            if way is Way.IPC and identity in _held:
                raise SegmentError(
                    "this process holds that segment itself: CUDA IPC opens only those of others"
                )
            opened = _opened.get(mapping)
            if opened is None:
                region = _SHARING[way].open_peer(descriptor, fd, ordinal, writable=writable)
                opened = _opened[mapping] = _verified(region, descriptor)
            elif opened.region.size != descriptor.size:
                raise RemoteProtocolError(
                    f"segment descriptor: got size {descriptor.size}, wanted {opened.region.size} as before"
                )
            opened.users += 1
        return cls(descriptor, mapping, opened.region)

    def _whole(self) -> torch.Tensor:
        return _tensor(self._region)

    def _read_incarnation(self) -> int:
        return self.incarnation

    def _copy_out(self, offset: int, length: int) -> bytes:
        return self._region.read(offset, length)

    def _copy_in(self, offset: int, content: bytes) -> None:
        self._region.write(offset, content)

    def _free(self) -> None:
        with _guard:
            opened = _opened[self._mapping]
            opened.users -= 1
            if opened.users == 0:
                del _opened[self._mapping]
                opened.region.release()


def _verified(region: Region, descriptor: SegmentDescriptor) -> _Opened:
    try:
        verify_header(region.read(0, HEADER_BYTES), descriptor)
    except BaseException:
        region.release()
        raise
    return _Opened(region)


class _CudaArray:
    """Raw GPU memory as torch takes it:
    https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html.
    """

    def __init__(self, region: Region) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (region.size,),
            "typestr": "|u1",
            "data": (region.address, False),  # torch takes nothing that is marked as read-only
            "version": 3,
        }


def _tensor(region: Region) -> torch.Tensor:
    """A uint8 tensor over GPU memory that does not keep it. SegmentError if torch cannot look at it."""
    import torch

    if not torch.cuda.is_available():
        raise SegmentError("this torch sees no GPU: install a CUDA build of torch that fits the driver")
    # The device must be the one that CUDA says the pointer is of: with any other torch would make a copy.
    tensor = torch.as_tensor(_CudaArray(region), device=f"cuda:{region.lies_on}")
    if tensor.data_ptr() != region.address:
        raise SegmentError(f"torch copied a segment (of cuda:{region.lies_on}) instead of looking at it")
    return tensor


_all_held: weakref.WeakSet[CudaSegment] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child must not keep the memory alive. It has no use of CUDA, and so no mapping."""
    for segment in list(_all_held):
        segment._close_file()
    _all_held.clear()


os.register_at_fork(after_in_child=_close_in_child)
