"""A shared mapping of a memfd that is really gone when it is unmapped.

Python's `mmap` cannot be closed while a tensor exports its memory, and keeps it alive as long as one does.
Here the mapping belongs to whoever made it, and views hold nothing; `SegmentMemory.borrow` is what keeps it
there.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vcache.errors import SegmentError
from vcache.room import numa_nodes

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

# Of <linux/mman.h>, <linux/mempolicy.h> and the architectures' system call tables; Python names none of them.
_MAP_FIXED: Final = 0x10
_MAP_POPULATE: Final = 0x8000
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_MADV_DONTFORK: Final = 10
_MADV_HUGEPAGE: Final = 14
_MADV_DONTDUMP: Final = 16
_MADV_POPULATE_WRITE: Final = 23
_MPOL_BIND: Final = 2
_SYS_MBIND: Final = {"x86_64": 237, "aarch64": 235, "riscv64": 235}

_SHMEM_THP: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.syscall.restype = ctypes.c_long


class SharedMapping:
    """All of a file, mapped shared and writable at `address`, until `unmap`.

    A forked child does not have it (MADV_DONTFORK): it would keep the memory alive, and touching it there
    ends the child. It is left out of core dumps. Large pages are used where the kernel offers them for
    shared memory.
    """

    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        self._fd = fd
        self.address = self._map(None, 0)
        self._advise()

    def _map(self, address: int | None, flags: int) -> int:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        got = _libc.mmap(address, self.size, protection, mmap.MAP_SHARED | flags, self._fd, 0)
        if got == _MAP_FAILED or got is None:
            raise SegmentError(f"cannot map {self.size} bytes: {os.strerror(ctypes.get_errno())}")
        return int(got)

    def _advise(self) -> None:
        for name, advice in (("DONTFORK", _MADV_DONTFORK), ("DONTDUMP", _MADV_DONTDUMP)):
            if number := self._madvise(0, self.size, advice):
                _log.warning("madvise(%s) on a segment: %s", name, os.strerror(number))
        if large_pages_offered() and (number := self._madvise(0, self.size, _MADV_HUGEPAGE)):
            _log.debug("madvise(HUGEPAGE) on a segment: %s", os.strerror(number))

    def _madvise(self, offset: int, length: int, advice: int) -> int:
        """0, or the error number."""
        return 0 if _libc.madvise(self.address + offset, length, advice) == 0 else ctypes.get_errno()

    def bind_to_numa_node(self, number: int) -> None:
        """Have the file's pages, also those to come, allocated on this NUMA node. Raises SegmentError."""
        nodes = numa_nodes()
        if number not in nodes:
            raise SegmentError(f"numa: got {number}, wanted one of the nodes with memory: {nodes}")
        call = _SYS_MBIND.get(platform.machine())
        if call is None:
            raise SegmentError(f"numa: not supported on {platform.machine()}; leave it out")
        bits = 8 * ctypes.sizeof(ctypes.c_ulong)
        mask = (ctypes.c_ulong * (number // bits + 1))()
        mask[number // bits] = 1 << number % bits
        # The kernel reads one bit less than it is told (mbind(2), BUGS of get_mempolicy).
        arguments = (ctypes.c_ulong(self.address), ctypes.c_ulong(self.size), ctypes.c_ulong(_MPOL_BIND))
        count = ctypes.c_ulong(bits * len(mask) + 1)
        if _libc.syscall(ctypes.c_long(call), *arguments, mask, count, ctypes.c_ulong(0)) != 0:
            reason = os.strerror(ctypes.get_errno())
            raise SegmentError(
                f"numa: mbind to node {number} was refused: {reason}; in a container it needs the capability "
                "SYS_NICE (docker run --cap-add SYS_NICE), or leave numa out"
            )

    def populate(self, offset: int = 0, length: int | None = None) -> bool:
        """Enter the pages into the page table, allocating those that are missing; False if that did not work.

        A first touch later would cost a copy almost as much as the copy itself.
        """
        return (
            self._madvise(offset, self.size - offset if length is None else length, _MADV_POPULATE_WRITE) == 0
        )

    def populate_all(self) -> None:
        """As `populate`, also on kernels before 5.14: by mapping once more in the same place."""
        if not self.populate():
            self._map(self.address, _MAP_FIXED | _MAP_POPULATE)
            self._advise()

    def read(self, offset: int, length: int) -> bytes:
        """A copy of some bytes."""
        return ctypes.string_at(self.address + offset, length)

    def read_word(self, offset: int) -> int:
        """The 64-bit word at a multiple of 8, read whole."""
        return ctypes.c_uint64.from_address(self.address + offset).value

    def write(self, offset: int, content: bytes) -> None:
        """Overwrite some bytes."""
        ctypes.memmove(self.address + offset, content, len(content))

    def write_word(self, offset: int, word: int) -> None:
        """Overwrite the 64-bit word at a multiple of 8, whole."""
        ctypes.c_uint64.from_address(self.address + offset).value = word

    def view(self, offset: int, length: int) -> memoryview:
        """Some bytes, writable, without torch; they do not keep it mapped."""
        return memoryview((ctypes.c_uint8 * length).from_address(self.address + offset)).cast("B")

    def tensor(self) -> torch.Tensor:
        """All of it as a 1-D uint8 tensor that does not keep it mapped."""
        import torch

        memory = (ctypes.c_uint8 * self.size).from_address(self.address)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def unmap(self) -> None:
        """Give the addresses back; to be called once."""
        if _libc.munmap(self.address, self.size) != 0:
            raise SegmentError(f"munmap of a segment: {os.strerror(ctypes.get_errno())}")


def large_pages_offered() -> bool:
    """Whether the kernel gives large pages to shared memory that asks for them."""
    try:
        return any(f"[{word}]" in _SHMEM_THP.read_text() for word in ("advise", "within_size", "always"))
    except OSError:  # a kernel without them
        return False
