"""Which chunk records there are, and which must go for room or for age. One thread; no network.

Records are files of their own (`files.py`); RocksDB has the index: every record's header and last use, so
that opening a database reads kilobytes and not what it holds. The index has a write-ahead log: what was
written survives the kill of any process. A crash of the machine may cost what was put in the last second or
so, before it was synchronised; such a record does not match its checksum, or is not there. An index that is
lost is built anew from the files. The clock is injected.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import shutil
import struct
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from heapq import nsmallest
from pathlib import Path
from typing import Final, NamedTuple

from rocksdict import Options, Rdict, WriteBatch, WriteOptions

from vcache.limits import MIB, RECORD_HEADER_BYTES, TIER_DISK_MARGIN_BYTES
from vcache.logs import Line
from vcache.tiers.record import Flaw, Header, has_expired, read_header
from vcache.tiers.rocksdb import files

_log = logging.getLogger(__name__)

_USED: Final = struct.Struct("<Q")
_FOLDER: Final = "index"

TIER_FLUSH_S: Final = 1.0
"""How much later than a put its file is synchronised: so much a crash of the machine may cost."""

SWEEP_S: Final = 60.0
"""How often expired records are looked for; one that is asked for is noticed at once."""


class Entry(NamedTuple):
    """What the index knows of a record; `size` with its header."""

    header: Header
    size: int
    used_ms: int


class Draft(NamedTuple):
    """Room for a record that somebody writes to `path` now; ended by `commit` or `abandon`."""

    key: bytes
    size: int
    path: str


class Database:
    """Records of at most `capacity_bytes` (0: as many as fit the disk), the least recently used go first. Not
    thread-safe.

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
            ("uses", "puts", "evicted", "expired", "damaged", "full", "failed", "reopened"), 0
        )
        self._clock = clock
        self._disk = disk or _disk_room
        self._directory = directory
        self._path = directory / _FOLDER
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._used_since: set[bytes] = set()
        self._drafts: set[Draft] = set()
        # Whoever was told a name by an earlier owner, and is slow, must not write into another's file.
        self._life = secrets.token_hex(4)
        self._draft_numbers = itertools.count(1)
        self._unsynced: list[str] = []
        self._unsynced_since_s = 0.0
        self._syncing: threading.Thread | None = None
        self._is_unsynced = False
        self._swept_s = clock()
        self._is_broken = False
        self._write = WriteOptions()
        self._write.no_slowdown = True  # a stall would hold the owner's loop
        self._open()

    def __len__(self) -> int:
        return len(self._entries)

    # -- reading

    def contains(self, key: bytes) -> bool:
        """Whether a record is here and has not expired."""
        entry = self._entries.get(key)
        return entry is not None and not self._has_expired(entry)

    def use(self, keys: Iterable[bytes]) -> None:
        """Records were read, or looked for, the last one most recently; what has no file any more is
        forgotten.
        """
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and not os.path.lexists(files.path_of(self._directory, key)):
                self._forget([key], "damaged")
            elif entry is not None:
                self._entries[key] = entry._replace(used_ms=self._now_ms())
                self._entries.move_to_end(key)
                self._used_since.add(key)
                self.counters["uses"] += 1

    def rows(self, after: bytes, limit: int) -> list[Entry]:
        """Up to `limit` records behind the key `after`, in the order of keys."""
        keys = nsmallest(limit, (key for key in self._entries if key > after))
        return [self._entries[key] for key in keys]

    # -- writing

    def begin(self, key: bytes, length: int) -> Draft | bool:
        """Make room for the record of a chunk of `length` bytes; True: it is here already. False: no room."""
        if self.contains(key):
            return True
        size = RECORD_HEADER_BYTES + length
        if length <= 0 or size > self._limit or not self._writable(size):
            return False
        self._forget(self._to_evict(key, size), "evicted")
        name = f"{self._life}-{next(self._draft_numbers)}"
        draft = Draft(key, size, files.draft_path(self._directory, name))
        self._drafts.add(draft)
        return draft

    def commit(self, draft: Draft) -> bool:
        """The record is written; whether it is here now. What goes wrong on the disk is a False."""
        self._drafts.discard(draft)
        if self.contains(draft.key):  # somebody else was first
            files.remove(draft.path)
            return True
        path = files.path_of(self._directory, draft.key)
        try:
            header = files.header_at(draft.path)
            if isinstance(header, Flaw) or header.key != draft.key or _size(header) != draft.size:
                raise ValueError(f"not the record of {draft.key.hex()}")
            os.replace(draft.path, path)
        except (OSError, ValueError) as error:
            files.remove(draft.path)
            self.counters["failed"] += 1
            _log.warning(Line("a record was not kept", error=str(error)))
            return False
        entry = Entry(header, draft.size, self._now_ms())
        if not self._indexed({draft.key: entry}):
            files.remove(path)
            return False
        self._forget_entry(draft.key)  # an expired one
        self._add(draft.key, entry)
        self.counters["puts"] += 1
        if not self._unsynced:
            self._unsynced_since_s = self._clock()
        self._unsynced.append(path)
        return True

    def abandon(self, draft: Draft, *, failed: bool = True) -> None:
        """Nobody writes it any more, and it is not whole."""
        self._drafts.discard(draft)
        self.counters["failed"] += failed
        files.remove(draft.path)

    def _to_evict(self, key: bytes, size: int) -> list[bytes]:
        victims = []
        room = self._limit - self.held_bytes - sum(draft.size for draft in self._drafts)
        for each, entry in self._entries.items():
            if room >= size:
                break
            if each != key:
                victims.append(each)
            room += entry.size
        return victims

    @property
    def _limit(self) -> int:
        return self.capacity_bytes or sys.maxsize

    def _indexed(self, entries: dict[bytes, Entry], gone: Iterable[bytes] = ()) -> bool:
        """Note in the index what there is and what not; whether that worked."""
        batch = WriteBatch(raw_mode=True)
        for key, entry in entries.items():
            batch.put(key, _packed(entry))
        for key in gone:
            batch.delete(key)
        if self._db is None:
            return False
        try:
            self._db.write(batch, self._write)
        except Exception as error:  # rocksdict raises nothing more particular
            self._fails("the index refuses writes", error)
            return False
        return True

    def _fails(self, what: str, error: Exception) -> None:
        self.counters["failed"] += 1
        self._is_broken = True
        _log.error(Line(what, error=str(error)))

    def _writable(self, size: int) -> bool:
        """Whether the disk has room and the index takes writes; it is opened anew if it did not."""
        free, total = self._disk(self._directory)
        unwritten = sum(draft.size for draft in self._drafts)
        if free < size + unwritten + min(TIER_DISK_MARGIN_BYTES, total // 16):
            self.counters["full"] += 1
            return False
        if self._is_broken:
            self._reopen()
        return not self._is_broken

    # -- forgetting

    def remove(self, keys: Iterable[bytes], *, damaged: bool = False) -> int:
        """Forget records for good, also if this process is killed right after; how many there were.

        Also files of these keys that the index does not know. damaged: how they are counted. Raises OSError
        if one cannot be removed.
        """
        wanted = list(dict.fromkeys(keys))
        here = sum(key in self._entries for key in wanted)
        self.counters["damaged"] += len(wanted) if damaged else 0
        self._forget(wanted, None)
        return here

    def clear(self) -> None:
        """Forget all. Raises OSError if a file cannot be removed."""
        self._forget(list(self._entries), None)

    def _forget(self, keys: list[bytes], why: str | None) -> None:
        """Remove files and entries; why: the counter of what goes by itself, and may fail to."""
        if not keys:
            return
        failed: OSError | None = None
        gone: list[bytes] = []
        for key in keys:
            try:
                files.remove_for_sure(files.path_of(self._directory, key))
            except OSError as error:  # it can still be read: whoever wants it gone has to know
                failed = error
                continue
            if key in self._entries:
                gone.append(key)
            self._forget_entry(key)
        if why is not None:
            self.counters[why] += len(gone)
        self._indexed({}, gone)  # an entry that stays is found to have no file
        if failed is not None:
            self.counters["failed"] += 1
            if why is None:
                raise failed
            _log.error(Line("a record cannot be removed", error=str(failed)))

    def _forget_entry(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.held_bytes -= entry.size
            self._used_since.discard(key)

    def _add(self, key: bytes, entry: Entry) -> None:
        self._entries[key] = entry
        self.held_bytes += entry.size

    # -- time

    def tick(self) -> None:
        """Do what is due: synchronise, forget what has expired, keep within the capacity."""
        now_s = self._clock()
        if not 0 <= now_s - self._swept_s < SWEEP_S:
            self._swept_s = now_s
            self.sweep()
        self._forget(self._to_evict(b"", 0), "evicted")
        is_due = self._unsynced and not 0 <= now_s - self._unsynced_since_s < TIER_FLUSH_S
        if is_due and (self._syncing is None or not self._syncing.is_alive()):
            paths, self._unsynced = self._unsynced, []
            self._syncing = threading.Thread(target=self._sync_files, args=(paths,), name="sync", daemon=True)
            self._syncing.start()

    def sweep(self) -> None:
        """Forget all that has expired, and note what was used lately."""
        self._forget([key for key, entry in self._entries.items() if self._has_expired(entry)], "expired")
        self._note_uses()

    def sync(self) -> bool:
        """Have everything on the disk; whether it is."""
        self._note_uses()
        if self._syncing is not None:
            self._syncing.join()
        paths, self._unsynced = self._unsynced, []
        self._sync_files(paths)
        if self._is_unsynced:  # now or before: the kernel says it once, and what it did not write is lost
            self._is_unsynced = False
            return False
        if self._db is None:
            return False
        try:
            self._db.flush_wal(True)
        except Exception as error:  # rocksdict raises nothing more particular
            self._fails("the index cannot be written to the disk", error)
            return False
        return True

    def _sync_files(self, paths: list[str]) -> None:
        try:
            files.sync(paths)
        except OSError as error:
            self._is_unsynced = True
            self._fails("records cannot be written to the disk", error)

    def _note_uses(self) -> None:
        if self._used_since:
            self._indexed({key: self._entries[key] for key in self._used_since})
            self._used_since.clear()

    # -- open and close

    def close(self) -> None:
        """Write everything and end."""
        self.sync()
        self._close()

    def _close(self) -> None:
        if self._db is None:
            return
        try:
            self._db.close()
        except Exception as error:  # what it could not write is found in the files
            _log.warning(Line("the index did not close in order", error=str(error)))

    def _reopen(self) -> None:
        self.counters["reopened"] += 1
        self._close()
        self._is_broken = False
        try:
            self._open()
        except Exception as error:
            self._is_broken = True
            _log.error(Line("the index cannot be opened", error=str(error)))

    def _open(self) -> None:
        writing = {draft.path for draft in self._drafts}
        if not writing:
            files.prepare(self._directory)
        self._db = self._index()
        self._read_index()

    def _index(self) -> Rdict | None:
        """The index; None where the disk is full: what is there is served, and nothing is written anyway."""
        options = self._options()
        try:
            return self._opened(options)
        except Exception as error:
            if _is_out_of_room(error):
                self._is_broken = True
                _log.error(Line("the index cannot be opened; records are served without", error=str(error)))
                return None
            if not _is_damage(error):
                raise
            _log.error(Line("the index is damaged; it is built anew", error=str(error)))
        shutil.rmtree(self._path, ignore_errors=True)
        return self._opened(options)

    def _opened(self, options: Options) -> Rdict:
        self._path.mkdir(mode=0o700, exist_ok=True)
        return Rdict(str(self._path), options)

    def _options(self) -> Options:
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_write_buffer_size(4 * MIB)
        options.set_max_background_jobs(2)
        options.set_keep_log_file_num(2)
        options.set_max_log_file_size(MIB)
        options.set_max_open_files(64)
        return options

    def _read_index(self) -> None:
        """Believe the files: entries without one are forgotten, files without an entry are looked into."""
        self._entries.clear()
        self._used_since.clear()
        self.held_bytes = 0
        indexed = dict(self._raw_index())
        found: dict[bytes, Entry] = {}
        missing: dict[bytes, Entry] = {}
        useless: list[str] = []
        for key, path, size in files.there(self._directory):
            known = _unpacked(key, indexed.pop(key, b""))
            entry = known or _from_file(key, path)
            if entry is None or entry.size != size or self._has_expired(entry):
                useless.append(path)
                indexed[key] = b""
                continue
            found[key] = entry
            if known is None:
                missing[key] = entry
        for path in useless:
            files.remove(path)
        self.counters["damaged"] += len(indexed)
        for key in sorted(found, key=lambda each: found[each].used_ms):
            self._add(key, found[key])
        if missing or indexed:
            self._indexed(missing, indexed)

    def _raw_index(self) -> Iterator[tuple[bytes, bytes]]:
        if self._db is None:
            return
        # Damage that shows while we read ends the reading: what was read counts, the rest is in the files.
        rows = self._db.items()
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


def _size(header: Header) -> int:
    return RECORD_HEADER_BYTES + header.length


def _packed(entry: Entry) -> bytes:
    return entry.header.pack() + _USED.pack(entry.used_ms)


def _unpacked(key: bytes, value: bytes) -> Entry | None:
    header = read_header(value)
    if isinstance(header, Flaw) or header.key != key or len(value) != RECORD_HEADER_BYTES + _USED.size:
        return None
    (used_ms,) = _USED.unpack_from(value, RECORD_HEADER_BYTES)
    return Entry(header, _size(header), used_ms)


def _from_file(key: bytes, path: str) -> Entry | None:
    """The entry of a file that the index does not know, as if it was used when it was made."""
    try:
        header = files.header_at(path)
    except OSError:
        return None
    if isinstance(header, Flaw) or header.key != key:
        return None
    return Entry(header, _size(header), header.created_ms)


def _disk_room(path: Path) -> tuple[int, int]:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def _is_out_of_room(error: Exception) -> bool:
    return any(words in str(error).lower() for words in ("no space left", "quota exceeded"))


def _is_damage(error: Exception) -> bool:
    """Whether an error at opening says that the files are damaged, and not that they are out of reach now."""
    text = str(error).lower()
    return any(word in text for word in ("corruption", "no such file", "not found", "invalid argument"))
