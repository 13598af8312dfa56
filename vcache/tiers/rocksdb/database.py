"""Chunk records in RocksDB: which there are, which must go for room or for age. One thread; no network.

Records lie in blob files, under their keys; a small column family beside them has every record's header and
last use, so that opening a database reads kilobytes and not what it holds. Both change in one batch. There is
no write-ahead log, which would write every chunk twice: what was not flushed when the process was killed is
lost, and a flush comes TIER_FLUSH_S after the first write that needs one. The clock is injected.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from rocksdict import (
    DBCompressionType,
    Options,
    Rdict,
    ReadOptions,
    WriteBatch,
    WriteOptions,
)

from vcache.limits import MIB, RECORD_HEADER_BYTES, TIER_DISK_MARGIN_BYTES, TIER_WRITE_BUFFER_BYTES
from vcache.logs import Line
from vcache.tiers.record import Flaw, Header, has_expired, read_header

_log = logging.getLogger(__name__)

_INDEX: Final = "index"
_USED: Final = struct.Struct("<Q")
_FOLDER: Final = "db"

TIER_FLUSH_S: Final = 1.0
"""How much later than a put its flush begins: so much a kill may cost, and small chunks share a file."""

SWEEP_S: Final = 60.0
"""How often expired records are looked for; one that is asked for is noticed at once."""


class Busy(Exception):
    """The disk does not keep up: nothing was written, try again in a moment."""


class Entry(NamedTuple):
    """What the index knows of a record; `size` with its header."""

    header: Header
    size: int
    used_ms: int


class Database:
    """Records of at most `capacity_bytes`, the least recently used go first. Not thread-safe.

    clock: seconds since 1970. disk: free and total bytes of the file system, for tests.
    """

    def __init__(
        self,
        directory: Path,
        capacity_bytes: int,
        ttl_s: float,
        clock: Callable[[], float],
        disk: Callable[[Path], tuple[int, int]] | None = None,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.ttl_s = ttl_s
        self.held_bytes = 0
        self.counters = dict.fromkeys(
            ("hits", "misses", "puts", "evicted", "expired", "damaged", "busy", "full", "failed", "reopened"),
            0,
        )
        self._clock = clock
        self._disk = disk or _disk_room
        self._path = directory / _FOLDER
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._used_since: set[bytes] = set()
        self._unflushed_since_s: float | None = None
        self._swept_s = clock()
        self._is_broken = False
        self._read_options = ReadOptions()
        self._read_options.set_verify_checksums(False)  # readers compare the record's own
        self._write = WriteOptions()
        self._write.disable_wal = True
        self._write.no_slowdown = True  # a stall would hold the owner's loop, and readers with it
        self._open()

    def __len__(self) -> int:
        return len(self._entries)

    # -- reading

    def contains(self, key: bytes) -> bool:
        """Whether a record is here and has not expired."""
        entry = self._entries.get(key)
        return entry is not None and not self._has_expired(entry)

    def size_of(self, key: bytes) -> int:
        """Bytes of the record, with its header; 0 if there is none."""
        return self._entries[key].size if self.contains(key) else 0

    def get(self, key: bytes, layout: bytes) -> tuple[bytes, int] | None:
        """The record, and when it expires (ms since 1970; 0: never). One of another layout is deleted."""
        entry = self._entries.get(key)
        if entry is not None and self._has_expired(entry):
            self._forget([key], "expired")
            entry = None
        if entry is not None and entry.header.layout != layout:
            self._forget([key], "damaged")
            entry = None
        record = self._read(key) if entry is not None else None
        if entry is None or record is None:
            self.counters["misses"] += 1
            return None
        self._entries[key] = entry._replace(used_ms=self._now_ms())
        self._entries.move_to_end(key)
        self._used_since.add(key)
        self.counters["hits"] += 1
        return record, entry.header.expiry_ms(self.ttl_s)

    def _read(self, key: bytes) -> bytes | None:
        try:
            record = self._db.get(key, read_opt=self._read_options)
        except Exception as error:  # a file is damaged or gone: rocksdict raises nothing more particular
            _log.warning(Line("a record cannot be read", error=str(error)))
            record = None
        if isinstance(record, bytes):
            return record
        self._forget([key], "damaged")
        return None

    def rows(self, after: bytes, limit: int) -> list[Entry]:
        """Up to `limit` records behind the key `after`, in the order of keys."""
        keys = sorted(key for key in self._entries if key > after)
        return [self._entries[key] for key in keys[:limit]]

    # -- writing

    def put(self, record: bytes) -> bool:
        """Keep a record; whether it is here now. Raises Busy. What goes wrong on the disk is a False."""
        header = read_header(record[:RECORD_HEADER_BYTES])
        if isinstance(header, Flaw) or header.length + RECORD_HEADER_BYTES != len(record):
            self.counters["failed"] += 1
            return False
        if self.contains(header.key):
            return True
        if len(record) > self.capacity_bytes or not self._writable(len(record)):
            return False
        entry = Entry(header, len(record), self._now_ms())
        self._forget(self._to_evict(header.key, len(record)), "evicted")
        batch = WriteBatch(raw_mode=True)
        batch.put(header.key, record)
        batch.put(header.key, _packed(entry), self._index)
        if not self._written(batch):
            return False
        self._forget_entry(header.key)  # an expired one
        self._entries[header.key] = entry
        self.held_bytes += entry.size
        self.counters["puts"] += 1
        return True

    def _to_evict(self, key: bytes, size: int) -> list[bytes]:
        victims, room = [], self.capacity_bytes - self.held_bytes
        for each, entry in self._entries.items():
            if room >= size:
                break
            if each != key:
                victims.append(each)
            room += entry.size
        return victims

    def _written(self, batch: WriteBatch) -> bool:
        try:
            self._db.write(batch, self._write)
        except Exception as error:  # rocksdict raises nothing more particular
            if "stall" in str(error).lower() or "incomplete" in str(error).lower():
                self.counters["busy"] += 1
                raise Busy(str(error)) from error
            self.counters["failed"] += 1
            self._is_broken = True
            _log.error(Line("the database refuses writes", error=str(error)))
            return False
        if self._unflushed_since_s is None:
            self._unflushed_since_s = self._clock()
        return True

    def _writable(self, size: int) -> bool:
        """Whether the disk has room and the database takes writes; it is opened anew if it did not."""
        free, total = self._disk(self._path)
        unwritten = int(self._db.property_int_value("rocksdb.cur-size-all-mem-tables") or 0)
        if free < size + unwritten + min(TIER_DISK_MARGIN_BYTES, total // 16):
            self.counters["full"] += 1
            return False
        if self._is_broken:
            self._reopen()
        return not self._is_broken

    # -- forgetting

    def remove(self, keys: Iterable[bytes]) -> int:
        """Forget records for good, also if this process is killed right after; how many there were."""
        here = [key for key in keys if key in self._entries]
        self._forget(here, None)
        if here:
            self.sync()
        return len(here)

    def clear(self) -> None:
        """Forget all, and give the disk back at once."""
        self._close()
        shutil.rmtree(self._path, ignore_errors=True)
        self._open()

    def _forget(self, keys: list[bytes], why: str | None) -> None:
        if not keys:
            return
        batch = WriteBatch(raw_mode=True)
        for key in keys:
            batch.delete(key)
            batch.delete(key, self._index)
        for key in keys:
            self._forget_entry(key)
        if why is not None:
            self.counters[why] += len(keys)
        try:
            self._written(batch)
        except Busy:  # they come back when the database is opened again: a miss either way, or a hit
            _log.debug(Line("deletions were put off", keys=len(keys)))

    def _forget_entry(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.held_bytes -= entry.size
            self._used_since.discard(key)

    # -- time

    def tick(self) -> None:
        """Do what is due: flush, forget what has expired, keep within the capacity."""
        now_s = self._clock()
        if not 0 <= now_s - self._swept_s < SWEEP_S:
            self._swept_s = now_s
            self.sweep()
        self._forget(self._to_evict(b"", 0), "evicted")
        if self._unflushed_since_s is not None and not 0 <= now_s - self._unflushed_since_s < TIER_FLUSH_S:
            self._flush(wait=False)

    def sweep(self) -> None:
        """Forget all that has expired, and note what was used lately."""
        self._forget([key for key, entry in self._entries.items() if self._has_expired(entry)], "expired")
        self._note_uses()

    def sync(self) -> bool:
        """Have everything on the disk; whether it is."""
        self._note_uses()
        return self._flush(wait=True)

    def _note_uses(self) -> None:
        if not self._used_since:
            return
        batch = WriteBatch(raw_mode=True)
        for key in self._used_since:
            batch.put(key, _packed(self._entries[key]), self._index)
        self._used_since.clear()
        try:
            self._written(batch)
        except Busy:
            _log.debug(Line("last uses were not noted"))

    def _flush(self, *, wait: bool) -> bool:
        try:
            # The index first: an entry without its record is a miss, a record without its entry is lost room.
            self._db.get_column_family(_INDEX).flush(wait)
            self._db.flush(wait)
        except Exception as error:  # rocksdict raises nothing more particular
            self.counters["failed"] += 1
            self._is_broken = True
            _log.error(Line("the database cannot write a file", error=str(error)))
            return False
        self._unflushed_since_s = None
        return True

    # -- open and close

    def close(self) -> None:
        """Write everything and end."""
        self.sync()
        self._close()

    def _close(self) -> None:
        self._index = None
        try:
            self._db.close()
        except Exception as error:  # what it could not write is lost, which is a miss
            _log.warning(Line("the database did not close in order", error=str(error)))

    def _reopen(self) -> None:
        self.counters["reopened"] += 1
        self._close()
        self._is_broken = False
        try:
            self._open()
        except Exception as error:
            self._is_broken = True
            _log.error(Line("the database cannot be opened", error=str(error)))

    def _open(self) -> None:
        options = self._options()
        try:
            self._db = self._opened(options)
        except Exception as error:
            if not _is_damage(error):
                raise
            _log.error(Line("the database is damaged; it begins empty", error=str(error)))
            shutil.rmtree(self._path, ignore_errors=True)
            self._db = self._opened(options)
        self._index = self._db.get_column_family_handle(_INDEX)
        self._read_index()

    def _opened(self, options: Options) -> Rdict:
        self._path.mkdir(mode=0o700, exist_ok=True)
        return Rdict(str(self._path), options, {_INDEX: options})

    def _options(self) -> Options:
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.create_missing_column_families(True)
        options.set_atomic_flush(True)  # without a log, so that a record and its index entry come together
        options.set_enable_blob_files(True)
        options.set_min_blob_size(4096)
        options.set_blob_compression_type(DBCompressionType.none())  # KV does not compress
        options.set_compression_type(DBCompressionType.none())
        options.set_enable_blob_gc(True)
        options.set_blob_gc_age_cutoff(0.5)
        buffer = max(min(TIER_WRITE_BUFFER_BYTES, self.capacity_bytes // 8), MIB)
        options.set_write_buffer_size(buffer)
        options.set_blob_file_size(buffer)
        options.set_max_write_buffer_number(3)
        options.set_max_background_jobs(2)
        # Tables hold keys only: merging them is cheap, and it is what lets blob files go.
        options.set_level_zero_file_num_compaction_trigger(2)
        options.set_keep_log_file_num(2)
        options.set_max_log_file_size(MIB)
        options.set_bytes_per_sync(8 * MIB)
        options.set_max_open_files(256)
        return options

    def _read_index(self) -> None:
        self._entries.clear()
        self._used_since.clear()
        self._unflushed_since_s = None
        self.held_bytes = 0
        found: list[tuple[bytes, Entry]] = []
        useless: list[bytes] = []
        for key, value in self._raw_index():
            entry = _unpacked(key, value)
            if entry is None or self._has_expired(entry):
                useless.append(key)
            else:
                found.append((key, entry))
        self._entries.update(sorted(found, key=lambda each: each[1].used_ms))
        self.held_bytes = sum(entry.size for _, entry in found)
        self._forget(useless, "damaged")

    def _raw_index(self) -> Iterator[tuple[bytes, bytes]]:
        # Damage that shows while we read ends the reading: what was read counts, the rest is lost.
        rows = self._db.get_column_family(_INDEX).items()
        while True:
            try:
                key, value = next(rows)
            except StopIteration:
                return
            except Exception as error:
                _log.error(Line("the index is damaged", error=str(error)))
                return
            yield bytes(key), bytes(value)

    def _has_expired(self, entry: Entry) -> bool:
        return has_expired(entry.header.expiry_ms(self.ttl_s), self._now_ms())

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


def _packed(entry: Entry) -> bytes:
    return entry.header.pack() + _USED.pack(entry.used_ms)


def _unpacked(key: bytes, value: bytes) -> Entry | None:
    header = read_header(value)
    if isinstance(header, Flaw) or header.key != key or len(value) != RECORD_HEADER_BYTES + _USED.size:
        return None
    (used_ms,) = _USED.unpack_from(value, RECORD_HEADER_BYTES)
    return Entry(header, header.length + RECORD_HEADER_BYTES, used_ms)


def _disk_room(path: Path) -> tuple[int, int]:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def _is_damage(error: Exception) -> bool:
    """Whether an error at opening says that the files are damaged, and not that they are out of reach now."""
    text = str(error).lower()
    return any(word in text for word in ("corruption", "no such file", "not found", "invalid argument"))
