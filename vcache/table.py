"""The extent table: one file that is the server's memory and every reader's fence.

The server is its only writer; clients map it read-only. Layout (little endian, this machine only):

    header    4 KiB   magic, version, boot, lineage, capacity; its first word says whether the table is in
    force segments  SEGMENTS_MAX records of 128 bytes
    extents   capacity records of 128 bytes

**Every record begins with one 8-byte word: `generation << 32 | state << 28 | check`.** A transition first
writes the fields that only the new state reads, then stores the word. The store is a single aligned one, so a
server that is killed at any instant leaves the record as it was or as it becomes. `check` is 28 bits of
CRC-32 over the state, the generation and the fields that the state reads: a record that does not match was
damaged, and a damaged table is given up as a whole.

    EMPTY      reads nothing: the record is not in use (its generation lives on)
    FREE       segment, offset, size
    RESERVED   and session, rid, layout
    COMMITTED  and key, length, namespace, expiry
    ORPHANED   as RESERVED: removed while somebody had it pinned; freed at the last release

Not under the check, because a wrong value can cost a hit but never a byte: `used_ns` (last use).
`pins` is not either; it only ever keeps an extent longer.

The fence: an extent's generation is raised before the extent is given to anybody else. A reader that finds,
after its copy has finished, the generation that it was granted (and the table in force) has read what was
committed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import struct
import zlib
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vcache.errors import RemoteProtocolError
from vcache.limits import SEGMENTS_MAX

_MAGIC: Final = b"VCacheX1"
_FORMAT: Final = 1
_HEADER_BYTES: Final = 4096
_RECORD_BYTES: Final = 128
_GROW_RECORDS: Final = 8192
_EXTENTS_AT: Final = _HEADER_BYTES + SEGMENTS_MAX * _RECORD_BYTES
_HEADER: Final = struct.Struct("<Q8sIIQQ36s")
_IN_FORCE: Final = 0x1F0C_E000_F0CE_0001


class State(IntEnum):
    """What an extent's record says of it."""

    EMPTY = 0
    FREE = 1
    RESERVED = 2
    COMMITTED = 3
    ORPHANED = 4


class Standing(Enum):
    """What has become of a chunk that somebody pinned."""

    THERE = "it is in the pool, and is found there"
    REMOVED = "somebody has removed it, or it has expired: nothing pinned is evicted"
    LOST = "its segment, or the whole table, has gone, or the pin has: nobody knows"


SEGMENT: Final = np.dtype(
    [
        ("word", "<u8"),
        ("incarnation", "<u8"),
        ("segment_id", "V16"),
        ("size", "<u8"),
        ("data_offset", "<u8"),
        ("session", "<u8"),
        ("rank", "<u4"),
        ("numa", "<u4"),
        ("device", "S64"),
    ]
)
"""A segment's record. Its word's generation is the segment's number; state COMMITTED means in use. numa: the
NUMA node that it is on or near, plus one; 0: unknown.
"""

RECORD: Final = np.dtype(
    [
        ("word", "<u8"),
        ("used_ns", "<u8"),
        ("pins", "<u8"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("segment", "<u8"),
        ("session", "<u8"),
        ("rid", "<u8"),
        ("layout", "V16"),
        ("key", "V32"),
        ("length", "<u4"),
        ("namespace", "V8"),
        ("expiry_s", "<u4"),
    ]
)
"""An extent's record. offset, size, length in bytes; used_ns and expiry_s on the boot's monotonic clock (0:
never).
"""

_FIELDS_AT: Final = 24
_FIELDS: Final[dict[int, slice]] = {
    State.EMPTY: slice(0, 0),
    State.FREE: slice(24, 48),
    State.RESERVED: slice(24, 80),
    State.COMMITTED: slice(24, 128),
    State.ORPHANED: slice(24, 80),
}
_SEGMENT_FIELDS: Final[dict[int, slice]] = {State.EMPTY: slice(0, 0), State.COMMITTED: slice(8, 128)}
_GEOMETRY: Final = struct.Struct("<QQQ")
_RESERVATION: Final = struct.Struct("<QQ16s")
_CONTENT: Final = struct.Struct("<32sI8sI")
_RESERVATION_AT: Final = 48
_CONTENT_AT: Final = 80
_GENERATION_MASK: Final = 0xFFFF_FFFF
_CHECK_MASK: Final = 0x0FFF_FFFF

assert SEGMENT.itemsize == RECORD.itemsize == _RECORD_BYTES


def boot_id() -> bytes:
    """This boot of this machine: generations of another one mean nothing here."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()


def word_of(generation: int, state: int, fields: bytes | memoryview) -> int:
    """A record's first word, from its generation, its state and the bytes that the state reads."""
    head = (generation & _GENERATION_MASK) << 32 | state << 28
    return head | (zlib.crc32(fields, zlib.crc32(head.to_bytes(8, "little"))) & _CHECK_MASK)


class TableDamaged(Exception):
    """The file is no table of this boot that can be trusted; the text says what is wrong."""


class ExtentTable:
    """The server's side: every change of a record, each of them whole at any instant.

    `open` finds a table to go on with, or makes one. Columns are numpy views of the file, for reading many
    records at once; only the methods below write.
    """

    def __init__(self, path: Path, fd: int, capacity: int, lineage: int) -> None:
        self.path = path
        self.fd = fd
        self.capacity = capacity
        self.lineage = lineage
        self._room = 0
        size = _EXTENTS_AT + capacity * _RECORD_BYTES
        self._map = mmap.mmap(fd, size)
        self._words = memoryview(self._map).cast("Q")
        self.segments: NDArray[Any] = np.frombuffer(self._map, SEGMENT, SEGMENTS_MAX, _HEADER_BYTES)
        self.records: NDArray[Any] = np.frombuffer(self._map, RECORD, capacity, _EXTENTS_AT)
        self.word: NDArray[np.uint64] = self.records["word"]
        self.used_ns: NDArray[np.uint64] = self.records["used_ns"]
        self.pins: NDArray[np.uint64] = self.records["pins"]
        self.offset: NDArray[np.uint64] = self.records["offset"]
        self.length: NDArray[np.uint32] = self.records["length"]
        self.layout: NDArray[np.void] = self.records["layout"]
        self.segment: NDArray[np.uint64] = self.records["segment"]

    # -- life

    @classmethod
    def create(
        cls, path: Path, capacity: int, *, boot: bytes | None = None, mode: int = 0o600
    ) -> ExtentTable:
        """A new, empty table of a new lineage at `path`. A table that was there is retired first: its readers
        miss.
        """
        retire(path)
        lineage = secrets.randbits(63) | 1
        fresh = path.with_suffix(".new")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        os.fchmod(fd, mode)
        os.ftruncate(fd, _EXTENTS_AT + capacity * _RECORD_BYTES)
        os.posix_fallocate(fd, 0, _EXTENTS_AT)
        header = _HEADER.pack(_IN_FORCE, _MAGIC, _FORMAT, _RECORD_BYTES, capacity, lineage, boot or boot_id())
        header += zlib.crc32(header).to_bytes(4, "little")
        # The zeros are written too: memory that was only allocated is a hole to SEEK_HOLE on tmpfs.
        os.pwrite(fd, header.ljust(_EXTENTS_AT, b"\0"), 0)
        fresh.replace(path)
        return cls(path, fd, capacity, lineage)

    @classmethod
    def open(cls, path: Path, *, boot: bytes | None = None) -> ExtentTable:
        """The table at `path`, with every record verified. Raises TableDamaged, FileNotFoundError."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            capacity, lineage = _verify_header(fd, boot or boot_id())
            table = cls(path, fd, capacity, lineage)
        except BaseException:
            os.close(fd)
            raise
        try:
            table._verify_records()
        except BaseException:
            table.close()
            raise
        return table

    def close(self) -> None:
        """Unmap and close; the file stays."""
        for name in (
            "segments",
            "records",
            "word",
            "used_ns",
            "pins",
            "offset",
            "length",
            "layout",
            "segment",
        ):
            delattr(self, name)
        self._words.release()
        os.close(self.fd)
        # A record that an exception's traceback still refers to keeps the map: it goes with the last of them.
        with contextlib.suppress(BufferError):
            self._map.close()

    def _verify_records(self) -> None:
        """Only what is allocated is read: a page that is merely looked at would take memory too."""
        written = os.lseek(self.fd, 0, os.SEEK_HOLE)
        if written < _EXTENTS_AT:
            raise TableDamaged(f"{written} bytes are there, wanted at least {_EXTENTS_AT}")
        self._room = min((written - _EXTENTS_AT) // _RECORD_BYTES, self.capacity)
        for slot in range(SEGMENTS_MAX):
            self._verify(_HEADER_BYTES + slot * _RECORD_BYTES, _SEGMENT_FIELDS)
        for index in self.in_use().tolist():
            self._verify(_EXTENTS_AT + index * _RECORD_BYTES, _FIELDS)

    def _verify(self, at: int, fields_of: dict[int, slice]) -> None:
        word = self._words[at >> 3]
        if word == 0:
            return
        fields = fields_of.get(word >> 28 & 0xF)
        if fields is None:
            raise TableDamaged(f"the record at byte {at} is in the unknown state {word >> 28 & 0xF}")
        if word != word_of(word >> 32, word >> 28 & 0xF, self._map[at : at + _RECORD_BYTES][fields]):
            raise TableDamaged(f"the record at byte {at} does not match its check")

    def in_use(self) -> NDArray[np.intp]:
        """Indices of the records that were ever used, EMPTY ones with a generation among them."""
        return np.flatnonzero(self.word[: self._room])

    def ensure(self, count: int) -> bool:
        """Make records [0, count) writable for sure; False when the file system is full (a write would be a
        SIGBUS).
        """
        if count > self._room:
            room = min(max(count, self._room + _GROW_RECORDS), self.capacity)
            try:
                os.posix_fallocate(self.fd, 0, _EXTENTS_AT + room * _RECORD_BYTES)
            except OSError:
                return False
            self._room = room
        return True

    # -- one record

    def _store(self, index: int, generation: int, state: State) -> None:
        at = _EXTENTS_AT + index * _RECORD_BYTES
        fields = _FIELDS[state]
        self._words[at >> 3] = word_of(generation, state, self._map[at + fields.start : at + fields.stop])

    def state(self, index: int) -> State:
        """The state of one extent."""
        return State(int(self._words[(_EXTENTS_AT >> 3) + index * 16]) >> 28 & 0xF)

    def in_state(self, indices: NDArray[np.intp], state: State) -> NDArray[np.bool_]:
        """Of each of these extents, whether it is in this state."""
        states: NDArray[np.uint64] = self.word[indices] >> np.uint64(28) & np.uint64(0xF)
        there: NDArray[np.bool_] = states == np.uint64(state)
        return there

    def generation(self, index: int) -> int:
        """The generation of one extent."""
        return int(self._words[(_EXTENTS_AT >> 3) + index * 16]) >> 32

    def key(self, index: int) -> bytes:
        """The key of one committed extent."""
        at = _EXTENTS_AT + index * _RECORD_BYTES + _CONTENT_AT
        return self._map[at : at + 32]

    def cut(self, index: int, segment: int, offset: int, size: int) -> None:
        """EMPTY → FREE: the record stands for these bytes of this segment."""
        assert self.state(index) is State.EMPTY, f"cut: extent {index} is {self.state(index).name}"
        at = _EXTENTS_AT + index * _RECORD_BYTES
        _GEOMETRY.pack_into(self._map, at + _FIELDS_AT, offset, size, segment)
        self._words[(at >> 3) + 1] = 0
        self._words[(at >> 3) + 2] = 0
        self._store(index, self.generation(index), State.FREE)

    def reserve(self, index: int, session: int, rid: int, layout: bytes) -> int:
        """FREE → RESERVED by a session's request; returns the generation that it is granted under."""
        word = self._words[(_EXTENTS_AT >> 3) + index * 16]
        assert word >> 28 & 0xF == State.FREE, f"reserve: extent {index} is {self.state(index).name}"
        at = _EXTENTS_AT + index * _RECORD_BYTES
        _RESERVATION.pack_into(self._map, at + _RESERVATION_AT, session, rid, layout)
        self._store(index, word >> 32, State.RESERVED)
        return word >> 32

    def commit(
        self, index: int, key: bytes, length: int, namespace: bytes, expiry_s: int, used_ns: int
    ) -> None:
        """RESERVED → COMMITTED: readers may be granted it from now on."""
        at = _EXTENTS_AT + index * _RECORD_BYTES
        word = self._words[at >> 3]
        assert word >> 28 & 0xF == State.RESERVED, f"commit: extent {index} is {self.state(index).name}"
        _CONTENT.pack_into(self._map, at + _CONTENT_AT, key, length, namespace, expiry_s)
        self._words[(at >> 3) + 1] = used_ns
        self._store(index, word >> 32, State.COMMITTED)

    def orphan(self, index: int) -> None:
        """COMMITTED → ORPHANED: nobody finds it any more, those who pinned it go on reading."""
        assert self.state(index) is State.COMMITTED
        self._store(index, self.generation(index), State.ORPHANED)

    def free(self, index: int) -> None:
        """RESERVED, COMMITTED or ORPHANED → FREE, under a new generation: who still reads it will know."""
        assert self.state(index) in (State.RESERVED, State.COMMITTED, State.ORPHANED)
        self._store(index, self.generation(index) + 1, State.FREE)

    def dissolve(self, index: int) -> None:
        """Any state → EMPTY, under a new generation: the record stands for no bytes any more."""
        self._store(index, self.generation(index) + 1, State.EMPTY)

    # -- segments

    def next_segment(self) -> int:
        """A segment number that this lineage never used."""
        return int((self.segments["word"] >> np.uint64(32)).max()) + 1

    def write_segment(
        self,
        slot: int,
        number: int,
        *,
        segment_id: bytes,
        incarnation: int,
        size: int,
        data_offset: int,
        session: int,
        rank: int,
        device: str,
        numa: int = -1,
    ) -> None:
        """Record a segment in a slot that is not in use. numa: -1: unknown."""
        assert int(self.segments["word"][slot]) >> 28 & 0xF != State.COMMITTED
        at = _HEADER_BYTES + slot * _RECORD_BYTES
        numbers = incarnation, segment_id, size, data_offset, session, rank, numa + 1
        fields = struct.pack("<Q16sQQQII64s", *numbers, device.encode())
        self._map[at + 8 : at + _RECORD_BYTES] = fields
        self._words[at >> 3] = word_of(number, State.COMMITTED, fields)

    def drop_segment(self, slot: int) -> None:
        """End a segment's record; its number is not used again."""
        at = (_HEADER_BYTES + slot * _RECORD_BYTES) >> 3
        self._words[at] = word_of(self._words[at] >> 32, State.EMPTY, b"")

    def segment_in_use(self, slot: int) -> int:
        """The number of the segment recorded in a slot, 0 if there is none."""
        word = int(self.segments["word"][slot])
        return word >> 32 if word >> 28 & 0xF == State.COMMITTED else 0


def _verify_header(fd: int, boot: bytes) -> tuple[int, int]:
    raw = os.pread(fd, _HEADER.size + 4, 0)
    if len(raw) < _HEADER.size + 4:
        raise TableDamaged(f"the header has {len(raw)} bytes, wanted {_HEADER.size + 4}")
    in_force, magic, version, record, capacity, lineage, written = _HEADER.unpack_from(raw)
    if magic != _MAGIC or version != _FORMAT or record != _RECORD_BYTES:
        raise TableDamaged("it is no extent table of this version")
    if (
        zlib.crc32(raw[: _HEADER.size]) != int.from_bytes(raw[_HEADER.size :], "little")
        or in_force != _IN_FORCE
    ):
        raise TableDamaged("its header is damaged or it was retired")
    if written.rstrip(b"\0") != boot:
        raise TableDamaged("it is of another boot")
    if os.fstat(fd).st_size != _EXTENTS_AT + capacity * _RECORD_BYTES:
        raise TableDamaged(
            f"it has {os.fstat(fd).st_size} bytes, wanted {_EXTENTS_AT + capacity * _RECORD_BYTES}"
        )
    return capacity, lineage


def retire(path: Path) -> None:
    """Take a table out of force for good: its readers find every fence broken. Nothing there is fine."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.pwrite(fd, bytes(8), 0)
    finally:
        os.close(fd)


class TableReader:
    """A client's side: the fence. Read-only; made from the descriptor that the server passed."""

    def __init__(self, fd: int) -> None:
        """Map the table and close `fd`. Raises RemoteProtocolError if it is no table."""
        try:
            size = os.fstat(fd).st_size
            raw = os.pread(fd, _HEADER.size, 0)
            if len(raw) < _HEADER.size:
                raise RemoteProtocolError(
                    f"extent table: got {len(raw)} bytes of header, wanted {_HEADER.size}"
                )
            _, magic, version, record, capacity, self.lineage, _ = _HEADER.unpack(raw)
            if (
                magic != _MAGIC
                or version != _FORMAT
                or record != _RECORD_BYTES
                or size < _EXTENTS_AT + capacity * record
            ):
                raise RemoteProtocolError("extent table: not a table of this version")
            self.capacity: int = capacity
            self._map = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._head: NDArray[np.uint64] = np.frombuffer(self._map, np.uint64, 1, 0)
        records = np.frombuffer(self._map, RECORD, capacity, _EXTENTS_AT)
        self._words: NDArray[np.uint64] = records["word"]
        self._generations: NDArray[np.uint32] = records.view(
            np.dtype({"names": ["generation"], "formats": ["<u4"], "offsets": [4], "itemsize": _RECORD_BYTES})
        )["generation"]

    @property
    def in_force(self) -> bool:
        """Whether the server still goes by this table."""
        return int(self._head[0]) == _IN_FORCE

    def unchanged(self, index: NDArray[Any], generation: NDArray[Any]) -> NDArray[np.bool_]:
        """Of each extent, whether it still has the generation that it was granted under.

        Call it when the copy has really finished. index, generation: integer arrays of one length, as granted
        (their range was checked when the answer was read). The copy's reads cannot be reordered behind these:
        copies release the GIL, and taking it again is a full fence.
        """
        same: NDArray[np.bool_] = self._generations[index] == generation
        return same if self.in_force else np.zeros_like(same)

    def standing(self, index: int, generation: int) -> Standing:
        """Whether one extent still is the chunk that it was granted as. Call it after what depends on it."""
        word = int(self._words[index])
        if not self.in_force or word >> 32 != generation:
            return Standing.LOST
        return Standing.THERE if word >> 28 & 0xF == State.COMMITTED else Standing.REMOVED
