"""GPU memory at an address of this process, however it came there."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Region(ABC):
    """Mapped GPU memory, until `release`. It belongs to whoever allocated or opened it.

    address, size: bytes. lies_on: the GPU, as this process numbers them, that CUDA says the memory is of: the
    one with which torch must be told of it. writable: whether this process may write to it.
    """

    def __init__(self, address: int, size: int, lies_on: int, *, writable: bool) -> None:
        self.address = address
        self.size = size
        self.lies_on = lies_on
        self.writable = writable

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """A copy of some bytes, for headers and probes. Raises SegmentError."""

    @abstractmethod
    def write(self, offset: int, content: bytes) -> None:
        """Overwrite some bytes, for headers and probes. Raises SegmentError."""

    @abstractmethod
    def release(self) -> None:
        """Unmap it, and free it if it was allocated here; called once. Raises SegmentError."""
