"""Shared memory of one connection between an engine and the owner of a database."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

from vcache.errors import RemoteProtocolError

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""With these nobody can make it shorter under the other's mapping: no access can end in SIGBUS."""


class Staging:
    """`size` bytes that both sides have mapped; `view` is all of it, writable."""

    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        self._map = mmap.mmap(fd, size)
        self.view = memoryview(self._map)

    def close(self) -> None:
        """Unmap it, now or when the last view of it has gone."""
        try:
            self.view.release()
            self._map.close()
        except BufferError:  # somebody still has a view of it: the mapping goes with that
            return


def made(size: int) -> tuple[Staging, int]:
    """New staging memory of at least `size` bytes, and its descriptor, which is the caller's to close."""
    size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    fd = os.memfd_create("vcache-tier", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
        return Staging(fd, size), fd
    except BaseException:
        os.close(fd)
        raise


def mapped(fd: int, size: int) -> Staging:
    """A peer's staging memory. Raises RemoteProtocolError if it is not what it says."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        found = os.fstat(fd).st_size
    except OSError as error:
        raise RemoteProtocolError(f"staging: not a sealed memfd ({error.strerror})") from error
    if seals & _SEALS != _SEALS or found != size:
        raise RemoteProtocolError(f"staging: {found} bytes with seals {seals:#x}, wanted {size} sealed ones")
    return Staging(fd, size)
