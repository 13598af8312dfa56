"""Segments in this process and in others: what is mapped, what is open."""

from __future__ import annotations

import os
from pathlib import Path

from tests.segment_peer import Peer
from vcache.limits import MIB
from vcache.segment import MappedSegment, Segment, SegmentDescriptor, decode_descriptor, map_segment

SIZE = 1 * MIB


def described(segment: Segment) -> SegmentDescriptor:
    """What its holder says of it."""
    return decode_descriptor(segment.descriptor()[0])


def mapped_here(segment: Segment) -> MappedSegment:
    """The segment as an importer has it, in this process."""
    encoded, fd = segment.descriptor()
    return map_segment(decode_descriptor(encoded), fd)


def mappings() -> int:
    """How many segments are mapped into this process."""
    return Path("/proc/self/maps").read_text().count("memfd:vcache-")


def has_mapping(peer: Peer) -> bool:
    """Whether a segment is mapped into the other process."""
    return "memfd:vcache-" in Path(f"/proc/{peer.process.pid}/maps").read_text()


def descriptors_of(peer: Peer) -> int:
    """How many files the other process has open."""
    return len(os.listdir(f"/proc/{peer.process.pid}/fd"))


def open_files() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))
