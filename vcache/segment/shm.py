"""Segments in shared memory: sealed memfds, without a name, passed from process to process as descriptors."""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import weakref
from typing import TYPE_CHECKING, Final

from vcache.errors import ArgumentError, RemoteProtocolError, SegmentError
from vcache.limits import EXTENT_ALIGN_BYTES, MIB, SEGMENT_FILL_STEP_BYTES
from vcache.room import memory_room
from vcache.segment.base import MappedSegment, Segment
from vcache.segment.header import (
    DATA_OFFSET,
    HEADER_BYTES,
    INCARNATION_AT,
    SegmentDescriptor,
    new_incarnation,
    new_segment_id,
    pack_header,
    verify_header,
)
from vcache.segment.mapping import SharedMapping, large_pages_offered

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

_SIZE_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""With these nobody can make the file shorter under a mapping: no access can end in SIGBUS."""


class ShmSegment(Segment):
    """Shared memory that this process holds. Several labels (shm:0, shm:1) play several GPUs."""

    def __init__(self, descriptor: SegmentDescriptor, fd: int, mapping: SharedMapping) -> None:
        super().__init__(descriptor)
        self._file = fd
        self._mapping = mapping
        _all_held.add(self)

    @classmethod
    def allocate(cls, device: str, size: int, *, numa: int | None = None) -> ShmSegment:
        """Allocate, populate and seal `size` bytes. Raises ArgumentError, SegmentError.

        Refused before any memory is touched if it is more than there is: see `vcache.room`.
        """
        align = max(EXTENT_ALIGN_BYTES, mmap.PAGESIZE)
        if size <= DATA_OFFSET or size % align:
            raise ArgumentError("size", size, f"a multiple of {align} above {DATA_OFFSET} (bytes)")
        _check_room(size, size, numa)
        fd = os.memfd_create(f"vcache-{device}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            mapping = _filled(fd, size, numa)
        except BaseException:
            os.close(fd)
            raise
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS | fcntl.F_SEAL_SEAL)
        descriptor = SegmentDescriptor("shm", size, new_segment_id(), new_incarnation(), device)
        header = pack_header(size=size, incarnation=descriptor.incarnation, segment_id=descriptor.segment_id)
        mapping.write(0, header)
        _log.info("allocated segment %s: %d MiB on %s", descriptor.segment_id.hex(), size // MIB, device)
        made = cls(descriptor, fd, mapping)
        made.numa = numa
        return made

    def _fd(self) -> int:
        return self._file

    def _host_memory(self) -> tuple[int, int]:
        return self._mapping.address, self._mapping.size

    def _whole(self) -> torch.Tensor:
        return self._mapping.tensor()

    def _read_incarnation(self) -> int:
        return self._mapping.read_word(INCARNATION_AT)

    def _host(self, offset: int, length: int) -> memoryview:
        return self._mapping.view(offset, length)

    def _copy_out(self, offset: int, length: int) -> bytes:
        return self._mapping.read(offset, length)

    def _copy_in(self, offset: int, content: bytes) -> None:
        self._mapping.write(offset, content)

    def _end_incarnation(self) -> None:
        self._mapping.write_word(INCARNATION_AT, 0)

    def _free(self) -> None:
        self._mapping.unmap()
        self._close_file()

    def _close_file(self) -> None:
        fd, self._file = self._file, -1
        if fd >= 0:
            os.close(fd)


class MappedShmSegment(MappedSegment):
    """A peer's shared memory, mapped and populated here."""

    def __init__(self, descriptor: SegmentDescriptor, mapping: SharedMapping) -> None:
        super().__init__(descriptor)
        self._mapping = mapping

    @classmethod
    def map(cls, descriptor: SegmentDescriptor, fd: int) -> MappedShmSegment:
        """Map a peer's memfd after checking that it is what the descriptor says. `fd` stays the caller's.

        Raises RemoteProtocolError if it is not, SegmentError if it cannot be mapped or has ended.
        """
        _check_file(descriptor, fd)
        mapping = SharedMapping(fd, descriptor.size)
        try:
            verify_header(mapping.read(0, HEADER_BYTES), descriptor)
            mapping.populate_all()
        except BaseException:
            mapping.unmap()
            raise
        return cls(descriptor, mapping)

    def _host_memory(self) -> tuple[int, int]:
        return self._mapping.address, self._mapping.size

    def _whole(self) -> torch.Tensor:
        return self._mapping.tensor()

    def _read_incarnation(self) -> int:
        return self._mapping.read_word(INCARNATION_AT)

    def _host(self, offset: int, length: int) -> memoryview:
        return self._mapping.view(offset, length)

    def _copy_out(self, offset: int, length: int) -> bytes:
        return self._mapping.read(offset, length)

    def _copy_in(self, offset: int, content: bytes) -> None:
        self._mapping.write(offset, content)

    def _free(self) -> None:
        self._mapping.unmap()


def _filled(fd: int, size: int, numa: int | None) -> SharedMapping:
    """The file with all its memory allocated, mapped and populated."""
    os.ftruncate(fd, size)
    mapping = SharedMapping(fd, size)
    try:
        if numa is not None:
            mapping.bind_to_numa_node(numa)
        large = large_pages_offered()
        for offset in range(0, size, SEGMENT_FILL_STEP_BYTES):
            length = min(SEGMENT_FILL_STEP_BYTES, size - offset)
            _check_room(length, size, numa)
            if large:
                mapping.populate(
                    offset, length
                )  # a fault that asks for large pages gets them; fallocate does not
            _allocate(fd, offset, length, size)
        mapping.populate_all()
    except BaseException:
        mapping.unmap()
        raise
    return mapping


def _allocate(fd: int, offset: int, length: int, size: int) -> None:
    """Have the kernel promise these pages, now: memory that is short later would end in SIGBUS."""
    try:
        os.posix_fallocate(fd, offset, length)
    except OSError as error:
        raise SegmentError(
            f"segment of {size // MIB} MiB: {error.strerror} after {offset // MIB} MiB; "
            f"there are {memory_room()}"
        ) from error


def _check_room(wanted: int, size: int, numa: int | None) -> None:
    """Refuse what would not fit: the kernel would not, it would kill a process."""
    room = memory_room(numa)
    if wanted > room.spendable:
        raise SegmentError(
            f"segment of {size // MIB} MiB does not fit: there are {room}; ask for less, or free memory there"
        )


def _check_file(descriptor: SegmentDescriptor, fd: int) -> None:
    """Check that no access within the size can fail later: sealed, as long as it says, and all there."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise RemoteProtocolError(
            f"segment file: not a memfd that can be sealed ({error.strerror})"
        ) from error
    if seals & _SIZE_SEALS != _SIZE_SEALS:
        raise RemoteProtocolError(f"segment file: got seals {seals:#x}, wanted at least {_SIZE_SEALS:#x}")
    found = os.fstat(fd)
    if found.st_size != descriptor.size:
        raise RemoteProtocolError(f"segment file: got {found.st_size} bytes, wanted {descriptor.size}")
    if found.st_blocks * 512 < descriptor.size:
        raise RemoteProtocolError(
            f"segment file: only {found.st_blocks * 512} of {descriptor.size} bytes are allocated"
        )


_all_held: weakref.WeakSet[ShmSegment] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child must not keep the memory alive: its mapping is gone already, now its descriptors."""
    for segment in list(_all_held):
        segment._close_file()
    _all_held.clear()


os.register_at_fork(after_in_child=_close_in_child)
