"""Segments from peers: what a peer may have forged is not mapped, and nothing of it stays."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.support.segments import SIZE, described, mapped_here, mappings, open_files
from vcache.errors import RemoteProtocolError, SegmentError
from vcache.limits import MIB
from vcache.segment import (
    DATA_OFFSET,
    Segment,
    SegmentDescriptor,
    allocate,
    decode_descriptor,
    encode_descriptor,
    map_segment,
)

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@pytest.fixture
def segment() -> Iterator[Segment]:
    with allocate("shm:0", SIZE) as made:
        yield made


def memfd(size: int, content: bytes = b"", seals: int = SEALS, *, allocated: bool = True) -> int:
    """A memfd as a peer might send it."""
    fd = os.memfd_create("vcache-forged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if allocated:
        os.posix_fallocate(fd, 0, size)
    os.pwrite(fd, content, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def header_of(segment: Segment) -> bytes:
    fd = segment.descriptor()[1]
    assert fd is not None
    return os.pread(fd, DATA_OFFSET, 0)


def refused(descriptor: SegmentDescriptor, fd: int, error: type[Exception], match: str) -> None:
    """Mapping it raises, and leaves nothing behind."""
    before = mappings(), open_files()
    try:
        with pytest.raises(error, match=match):
            map_segment(descriptor, fd)
        assert (mappings(), open_files()) == before
    finally:
        os.close(fd)


def test_a_file_that_could_shrink_is_refused(segment: Segment) -> None:
    for seals in (0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW):
        fd = memfd(SIZE, header_of(segment), seals)
        refused(described(segment), fd, RemoteProtocolError, "got seals")


def test_a_file_that_is_no_memfd_is_refused(segment: Segment, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE))
    fd = os.open(tmp_path / "file", os.O_RDWR)
    refused(described(segment), fd, RemoteProtocolError, "segment file: ")


def test_a_file_of_another_size_is_refused(segment: Segment) -> None:
    for size in (SIZE - 4096, SIZE + 4096):
        fd = memfd(size, header_of(segment))
        refused(described(segment), fd, RemoteProtocolError, f"got {size} bytes, wanted {SIZE}")


def test_a_file_with_holes_is_refused(segment: Segment) -> None:
    fd = memfd(SIZE, header_of(segment), allocated=False)
    refused(described(segment), fd, RemoteProtocolError, "are allocated")


def test_a_file_without_a_header_is_refused(segment: Segment) -> None:
    refused(described(segment), memfd(SIZE), RemoteProtocolError, "magic")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("segment_id", b"x" * 16, "got id"),
        ("incarnation", 7, "got incarnation"),
        ("size", SIZE + 4096, "got 1048576 bytes, wanted 1052672"),
    ],
)
def test_a_descriptor_that_disagrees_with_the_header_is_refused(
    segment: Segment, field: str, value: object, match: str
) -> None:
    fd = segment.descriptor()[1]
    assert fd is not None
    forged = msgspec.structs.replace(described(segment), **{field: value})
    refused(forged, os.dup(fd), RemoteProtocolError, match)


def test_a_header_of_another_size_or_version_is_refused(segment: Segment) -> None:
    header = bytearray(header_of(segment))
    header[16:24] = (SIZE // 2).to_bytes(8, "little")
    refused(described(segment), memfd(SIZE, bytes(header)), RemoteProtocolError, "got size 524288")
    header = bytearray(header_of(segment))
    header[8] = 9
    refused(described(segment), memfd(SIZE, bytes(header)), SegmentError, "got version 9, wanted 1")


def test_an_ended_incarnation_is_not_mapped(segment: Segment) -> None:
    encoded, fd = segment.descriptor()
    assert fd is not None
    kept = os.dup(fd)
    segment.close()
    refused(decode_descriptor(encoded), kept, SegmentError, "was closed by its holder")


def test_without_its_file_shared_memory_is_not_mapped(segment: Segment) -> None:
    with pytest.raises(RemoteProtocolError, match="without a file descriptor"):
        map_segment(described(segment), None)


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"\xff",
        b"x" * 5000,
        msgspec.msgpack.encode(["shm", 1 * MIB, b"short", 1, "shm:0"]),
        msgspec.msgpack.encode(["disk", 1 * MIB, b"x" * 16, 1, "shm:0"]),
        msgspec.msgpack.encode(["shm", 100, b"x" * 16, 1, "shm:0"]),
        msgspec.msgpack.encode(["shm", -1, b"x" * 16, 1, "shm:0"]),
        msgspec.msgpack.encode(["shm", 1 << 63, b"x" * 16, 1, "shm:0"]),
        msgspec.msgpack.encode(["shm", 1 * MIB, b"x" * 16, 0, "shm:0"]),
        msgspec.msgpack.encode(["shm", 1 * MIB, b"x" * 16, 1, "x" * 99]),
    ],
)
def test_a_malformed_descriptor_is_refused(encoded: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="segment descriptor"):
        decode_descriptor(encoded)


def test_the_largest_incarnation_travels(segment: Segment) -> None:
    one = msgspec.structs.replace(described(segment), incarnation=2**64 - 1)
    assert decode_descriptor(encode_descriptor(one)) == one


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 1),
        (DATA_OFFSET - 1, 2),
        (DATA_OFFSET, 0),
        (DATA_OFFSET, -1),
        (SIZE, 1),
        (SIZE - 4, 5),
        (1 << 63, 1),
    ],
)
def test_an_extent_outside_the_data_is_refused(segment: Segment, offset: int, length: int) -> None:
    mapped = mapped_here(segment)
    for memory in (segment, mapped):
        with pytest.raises(RemoteProtocolError, match=f"got offset {offset} and length {length}"):
            memory.view(offset, length)
    mapped.retire()
