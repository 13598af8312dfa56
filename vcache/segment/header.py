"""What identifies a segment: the header at its beginning, and the descriptor that travels to importers.

Both name the same id, incarnation and size. The descriptor says where memory is, the header what it is: an
importer believes neither until they agree.
"""

from __future__ import annotations

import os
import re
import struct
from typing import Annotated, Final, Literal

import msgspec

from vcache.errors import ArgumentError, RemoteProtocolError, SegmentError
from vcache.limits import SEGMENT_DESCRIPTOR_BYTES_MAX, SEGMENT_HEADER_BYTES

DATA_OFFSET: Final = SEGMENT_HEADER_BYTES
"""Where extents may begin, in bytes from the segment's start."""

SEGMENT_ID_BYTES: Final = 16
"""A segment's id is random: 128 bits, so that nobody assigns them."""

_MAGIC: Final = b"VCSEGMNT"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sIIQQ16s")
"""magic, version, data offset, size, incarnation, segment id."""

HEADER_BYTES: Final = _HEADER.size
INCARNATION_AT: Final = 24
"""Where the incarnation lies in the header: 8 bytes, aligned, so that they are read and written whole."""


_UUID: Final = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"

IPC_HANDLE_BYTES: Final = 64
"""CUDA_IPC_HANDLE_SIZE of cuda.h."""


class SegmentDescriptor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What an importer needs to know of a segment; it comes from a peer and is checked when decoded.

    kind: shared memory ("shm") and GPU memory by file descriptor ("cuda-fd") come with that descriptor beside
    them, GPU memory by legacy CUDA IPC ("cuda") has a `handle` of 64 bytes instead. size: bytes, header
    included. device: the label by which all processes know it, "shm:0" or "cuda:GPU-…" with the GPU's UUID.
    """

    kind: Literal["shm", "cuda", "cuda-fd"]
    size: Annotated[int, msgspec.Meta(gt=SEGMENT_HEADER_BYTES, lt=1 << 62)]
    segment_id: Annotated[bytes, msgspec.Meta(min_length=SEGMENT_ID_BYTES, max_length=SEGMENT_ID_BYTES)]
    incarnation: Annotated[int, msgspec.Meta(gt=0)]
    device: Annotated[str, msgspec.Meta(pattern=rf"^(shm:[0-9]{{1,4}}|cuda:(GPU|MIG)-{_UUID})\Z")]
    handle: Annotated[bytes, msgspec.Meta(max_length=IPC_HANDLE_BYTES)] = b""

    @property
    def gpu(self) -> str:
        """The UUID of the GPU that the memory lies on; empty for shared memory."""
        return "" if self.kind == "shm" else self.device.partition(":")[2]


_decoder: Final = msgspec.msgpack.Decoder(SegmentDescriptor)


def encode_descriptor(descriptor: SegmentDescriptor) -> bytes:
    """The bytes that travel in a message."""
    return msgspec.msgpack.encode(descriptor)


def decode_descriptor(encoded: bytes) -> SegmentDescriptor:
    """The descriptor in a peer's message. Raises RemoteProtocolError if it is too long or malformed."""
    if len(encoded) > SEGMENT_DESCRIPTOR_BYTES_MAX:
        raise RemoteProtocolError(
            f"segment descriptor: got {len(encoded)} bytes, wanted at most {SEGMENT_DESCRIPTOR_BYTES_MAX}"
        )
    try:
        descriptor = _decoder.decode(encoded)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"segment descriptor: {error}") from error
    if descriptor.device.startswith("shm:") != (descriptor.kind == "shm"):
        raise RemoteProtocolError(f"segment descriptor: a {descriptor.kind!r} segment on {descriptor.device}")
    wanted = IPC_HANDLE_BYTES if descriptor.kind == "cuda" else 0
    if len(descriptor.handle) != wanted:
        got = len(descriptor.handle)
        raise RemoteProtocolError(f"segment descriptor: got a handle of {got} bytes, wanted {wanted}")
    return descriptor


def pack_header(*, size: int, incarnation: int, segment_id: bytes) -> bytes:
    """The first HEADER_BYTES of a segment."""
    return _HEADER.pack(_MAGIC, _VERSION, DATA_OFFSET, size, incarnation, segment_id)


def verify_header(header: bytes, descriptor: SegmentDescriptor) -> None:
    """Check that a segment's first bytes agree with its descriptor.

    Raises RemoteProtocolError if it is no segment or another one, SegmentError if its incarnation has ended
    or its layout is of another version.
    """
    magic, version, data_offset, size, incarnation, segment_id = _HEADER.unpack(header[:HEADER_BYTES])
    if magic != _MAGIC:
        raise RemoteProtocolError(f"segment header: got magic {magic!r}, wanted {_MAGIC!r}")
    if (version, data_offset) != (_VERSION, DATA_OFFSET):
        raise SegmentError(
            f"segment header: got version {version}, wanted {_VERSION}: the holder runs another VCache"
        )
    if segment_id != descriptor.segment_id:
        raise RemoteProtocolError(
            f"segment header: got id {segment_id.hex()}, wanted {descriptor.segment_id.hex()}"
        )
    if incarnation == 0:
        raise SegmentError(f"segment {segment_id.hex()} was closed by its holder")
    if incarnation != descriptor.incarnation:
        raise RemoteProtocolError(
            f"segment header: got incarnation {incarnation:x}, wanted {descriptor.incarnation:x}"
        )
    if size != descriptor.size:
        raise RemoteProtocolError(f"segment header: got size {size}, wanted {descriptor.size}")


def new_segment_id() -> bytes:
    """16 random bytes."""
    return os.urandom(SEGMENT_ID_BYTES)


def new_incarnation() -> int:
    """A random number from 1 to 2^64 - 1; 0 says in a header that the incarnation has ended."""
    while True:
        incarnation = int.from_bytes(os.urandom(8), "little")
        if incarnation:
            return incarnation


def parse_device(device: str) -> tuple[str, int]:
    """ "cuda:1" as ("cuda", 1). Raises ArgumentError."""
    matched = re.fullmatch(r"(shm|cuda):([0-9]{1,4})", device)
    if matched is None:
        raise ArgumentError("device", repr(device), '"shm:N" or "cuda:N", for example "shm:0"')
    return matched[1], int(matched[2])
