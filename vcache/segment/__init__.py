"""Segments: the memory that a process lends to the pool, and how others map it.

What of torch, cupy and CUDA is needed is imported where memory is looked at, not with this package.
"""

from __future__ import annotations

from vcache.errors import RemoteProtocolError
from vcache.segment.base import Borrow, MappedSegment, Segment, SegmentMemory
from vcache.segment.header import (
    DATA_OFFSET,
    SegmentDescriptor,
    decode_descriptor,
    encode_descriptor,
    parse_device,
)

__all__ = [
    "DATA_OFFSET",
    "Borrow",
    "MappedSegment",
    "Segment",
    "SegmentDescriptor",
    "SegmentMemory",
    "allocate",
    "decode_descriptor",
    "device_label",
    "encode_descriptor",
    "map_segment",
    "parse_device",
]


def allocate(device: str, size: int, *, numa: int | None = None) -> Segment:
    """Allocate a segment on a device: "shm:0" (shared memory, the number is a label) or "cuda:0" (that GPU).

    size: bytes, header included; a multiple of 4 KiB (shm) or 2 MiB (cuda). numa: the NUMA node of shared
    memory. Raises ArgumentError, and SegmentError with how much there is if it does not fit.
    """
    kind, number = parse_device(device)
    if kind == "shm":
        from vcache.segment.shm import ShmSegment

        return ShmSegment.allocate(device, size, numa=numa)
    from vcache.segment.cuda import CudaSegment

    return CudaSegment.allocate(number, size, numa=numa)


def map_segment(
    descriptor: SegmentDescriptor,
    fd: int | None = None,
    *,
    own_device: str | None = None,
    writable: bool = True,
) -> MappedSegment:
    """Map a peer's segment, verified. Raises RemoteProtocolError if it is not what its descriptor says.

    fd: of the memfd or of the GPU's memory, where the segment has one; it stays the caller's, who may close
    it afterwards. own_device: the importer's own GPU ("cuda:1"), with which a peer's GPU memory is opened; by
    default torch's current one. writable: whether this process will write to it; False is a promise that
    GPU memory by file descriptor is held to (`MappedSegment.writable` says what became of it). Raises
    SegmentError if the segment has ended or cannot be mapped here.
    """
    if descriptor.kind == "shm":
        if fd is None:
            raise RemoteProtocolError(f"segment {descriptor.segment_id.hex()} came without a file descriptor")
        from vcache.segment.shm import MappedShmSegment

        return MappedShmSegment.map(descriptor, fd)
    from vcache.segment.cuda import MappedCudaSegment

    return MappedCudaSegment.map(descriptor, fd, own_device, writable=writable)


def device_label(device: str) -> str:
    """The label by which all processes of the machine know a device: "cuda:1" becomes "cuda:GPU-…".

    "shm:1" is one already. Raises ArgumentError, and SegmentError where there is no such GPU.
    """
    if parse_device(device)[0] == "shm":
        return device
    from vcache.segment import gpu

    return gpu.device_label(device)
