"""The database of the local tier, in this process: index, room, age, damage, a disk that is full."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from vcache.limits import MIB, RECORD_HEADER_BYTES
from vcache.tiers.record import Header, header_for
from vcache.tiers.rocksdb import files
from vcache.tiers.rocksdb.database import SWEEP_S, TIER_FLUSH_S, Database, Draft

LAYOUT, OTHER = b"L" * 16, b"O" * 16
SIZE = 64 << 10
RECORD = SIZE + RECORD_HEADER_BYTES


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def chunk(number: int, size: int = SIZE) -> bytes:
    return bytes([number % 251]) * size


def put_record(database: Database, record: bytes, number: int, length: int) -> bool:
    """What an engine does: ask for room, write, say so. record: what it writes."""
    draft = database.begin(key(number), length)
    if not isinstance(draft, Draft):
        return draft
    Path(draft.path).write_bytes(record)
    return database.commit(draft)


def read_record(path: Path, number: int, layout: bytes = LAYOUT, size: int = SIZE) -> bytes | None:
    """What an engine does: the chunk, or None if there is none that is right."""
    into = bytearray(size)
    try:
        header = files.read(files.path_of(path, key(number)), key(number), layout, memoryview(into))
    except OSError:
        return None
    return bytes(into) if isinstance(header, Header) else None


class Clock:
    """Seconds since 1970, moved by hand."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Disk:
    """Free and total bytes, as the test says."""

    def __init__(self) -> None:
        self.free = 1 << 40

    def __call__(self, _: Path) -> tuple[int, int]:
        return self.free, 1 << 40


class Bench:
    """A database that can be closed and opened again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock, self.disk = Clock(), Disk()
        self.database = self.open()

    def open(self, capacity: int = 64 * MIB, ttl_s: float = 0.0) -> Database:
        self.database = Database(self.path, capacity, ttl_s, self.clock, self.disk)
        return self.database

    def put(self, number: int, *, expires_ms: int = 0, size: int = SIZE) -> bool:
        content = chunk(number, size)
        self.clock.now_s += 0.001
        header = header_for(key(number), LAYOUT, content, int(self.clock() * 1000), expires_ms)
        return put_record(self.database, header.pack() + content, number, size)

    def get(self, number: int, layout: bytes = LAYOUT) -> bool:
        """Whether it is here; that its bytes are right is asserted."""
        self.clock.now_s += 0.001
        found = read_record(self.path, number, layout) if self.database.contains(key(number)) else None
        if found is None:
            return False
        assert found == chunk(number)
        self.database.use([key(number)])
        return True

    def here(self, *numbers: int) -> list[int]:
        return [number for number in numbers if self.database.contains(key(number))]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.database.close()


def test_what_was_put_is_there_also_after_opening_anew(bench: Bench) -> None:
    assert bench.put(1)
    assert bench.get(1)
    assert not bench.get(2)
    bench.database.close()
    bench.open()
    assert bench.get(1)
    assert (len(bench.database), bench.database.held_bytes) == (1, RECORD)


def test_a_key_that_is_there_keeps_what_it_has(bench: Bench) -> None:
    assert bench.put(1)
    assert bench.put(1, size=2 * SIZE)
    assert bench.get(1)
    assert bench.database.counters["puts"] == 1


def test_the_least_recently_used_go_first_also_after_opening_anew(bench: Bench) -> None:
    bench.database.capacity_bytes = 3 * RECORD
    for number in (1, 2, 3):
        bench.put(number)
    assert bench.get(1)
    bench.put(4)
    assert bench.here(1, 2, 3, 4) == [1, 3, 4]
    assert bench.get(3)
    bench.database.close()
    bench.open()
    bench.database.capacity_bytes = 3 * RECORD
    bench.put(5)
    assert bench.here(1, 3, 4, 5) == [3, 4, 5]
    assert bench.database.held_bytes == 3 * RECORD


def test_a_smaller_capacity_is_kept_from_the_next_tick_on(bench: Bench) -> None:
    for number in range(8):
        bench.put(number)
    bench.database.capacity_bytes = 2 * RECORD
    bench.database.tick()
    assert bench.here(*range(8)) == [6, 7]


def test_one_larger_than_everything_is_not_kept_and_evicts_nothing(bench: Bench) -> None:
    bench.put(1)
    bench.database.capacity_bytes = RECORD
    assert not bench.put(2, size=2 * SIZE)
    assert bench.here(1, 2) == [1]


def test_age_counts_by_the_time_to_live_of_now(bench: Bench) -> None:
    bench.put(1)
    bench.clock.now_s += 50
    bench.put(2)
    bench.database.ttl_s = 40
    assert bench.here(1, 2) == [2]
    bench.database.ttl_s = 100
    assert bench.here(1, 2) == [1, 2]
    bench.clock.now_s += 60
    assert bench.here(1, 2) == [2]
    bench.clock.now_s += SWEEP_S
    bench.database.tick()
    bench.database.ttl_s = 0
    assert bench.here(1, 2) == [], "what was swept is gone for good"


def test_a_record_expires_at_its_own_time_and_is_swept(bench: Bench) -> None:
    bench.put(1, expires_ms=int((bench.clock() + 10) * 1000))
    bench.put(2)
    bench.clock.now_s += SWEEP_S + 1
    bench.database.tick()
    assert (len(bench.database), bench.database.counters["expired"]) == (1, 1)
    assert bench.put(1)
    assert bench.here(1, 2) == [1, 2]


def test_what_expired_while_it_was_closed_is_not_there(bench: Bench) -> None:
    bench.put(1)
    bench.database.close()
    bench.clock.now_s += 100
    bench.open(ttl_s=50)
    assert len(bench.database) == 0


def test_a_clock_that_goes_back_expires_nothing_early(bench: Bench) -> None:
    bench.database.ttl_s = 10
    bench.put(1)
    bench.clock.now_s -= 1_000
    bench.database.tick()
    assert bench.get(1)


def test_what_was_removed_or_cleared_stays_so(bench: Bench) -> None:
    for number in (1, 2, 3):
        bench.put(number)
    assert bench.database.remove([key(1), key(9)]) == 1
    bench.database.close()
    bench.open()
    assert bench.here(1, 2, 3) == [2, 3]
    bench.database.clear()
    assert bench.put(4)
    bench.database.close()
    bench.open()
    assert bench.here(1, 2, 3, 4) == [4]


def test_rows_come_in_the_order_of_keys(bench: Bench) -> None:
    for number in (5, 1, 3):
        bench.put(number)
    rows = bench.database.rows(b"", 2)
    assert [row.header.key for row in rows] == [key(1), key(3)]
    assert [row.header.key for row in bench.database.rows(key(3), 2)] == [key(5)]


@pytest.mark.parametrize("wrong", ["no header", "too short", "another's", "too long"])
def test_what_is_no_record_is_not_kept(bench: Bench, wrong: str) -> None:
    content = chunk(1)
    header = header_for(key(2 if wrong == "another's" else 1), LAYOUT, content, 1).pack()
    record = {"no header": content, "too short": header + content[:-1], "too long": header + content + b"x"}
    assert not put_record(bench.database, record.get(wrong, header + content), 1, SIZE)
    assert bench.database.counters["failed"] == 1
    assert len(bench.database) == 0
    assert left(bench.path) == []


def left(path: Path) -> list[str]:
    """All files of records, whole or not."""
    return sorted(each.name for each in (path / files.FOLDER).rglob("*") if each.is_file())


def test_of_two_that_write_one_key_the_first_counts(bench: Bench) -> None:
    drafts = [bench.database.begin(key(1), SIZE) for _ in range(2)]
    record = header_for(key(1), LAYOUT, chunk(1), 1).pack() + chunk(1)
    for draft in drafts:
        assert isinstance(draft, Draft)
        Path(draft.path).write_bytes(record)
        assert bench.database.commit(draft)
    assert bench.database.counters["puts"] == 1
    assert bench.database.begin(key(1), SIZE) is True
    assert left(bench.path) == [key(1).hex()]


def test_what_is_being_written_has_its_room(bench: Bench) -> None:
    bench.database.capacity_bytes = 2 * RECORD
    bench.put(1)
    bench.put(2)
    draft = bench.database.begin(key(3), SIZE)
    assert isinstance(draft, Draft) and bench.here(1, 2) == [2]
    bench.put(4)
    assert bench.here(1, 2, 3, 4) == [4]
    bench.database.abandon(draft)
    bench.put(5)
    assert bench.here(4, 5) == [4, 5]


def test_who_is_slow_does_not_write_into_the_file_of_another(bench: Bench) -> None:
    """An engine was told where to write, the owner was killed, and its successor tells another one."""
    slow = bench.database.begin(key(1), SIZE)
    bench.database.close()
    bench.open()
    other = bench.database.begin(key(2), SIZE)
    assert isinstance(slow, Draft) and isinstance(other, Draft)
    assert slow.path != other.path


def test_what_was_being_written_at_a_kill_is_gone(bench: Bench) -> None:
    draft = bench.database.begin(key(1), SIZE)
    assert isinstance(draft, Draft)
    Path(draft.path).write_bytes(b"half of")
    bench.database.close()
    bench.open()
    assert left(bench.path) == []


def test_a_full_disk_takes_nothing_and_gives_what_it_has(bench: Bench) -> None:
    bench.put(1)
    bench.disk.free = 1 * MIB
    assert not bench.put(2)
    assert bench.get(1)
    assert bench.database.counters["full"] == 1
    bench.disk.free = 1 << 40
    assert bench.put(2)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0xFF]))


def record_path(bench: Bench, number: int) -> Path:
    return Path(files.path_of(bench.path, key(number)))


@pytest.mark.parametrize("at", [3, 20, 40, 90, 125, 200, -1])
def test_damaged_bytes_are_never_served(bench: Bench, at: int) -> None:
    """Of the header or of the chunk, whether the database is open meanwhile or not."""
    bench.put(1)
    flip(record_path(bench, 1), at % RECORD)
    assert read_record(bench.path, 1) is None
    bench.database.close()
    bench.open()
    assert read_record(bench.path, 1) is None


@pytest.mark.parametrize("pattern", ["MANIFEST-*", "CURRENT", "*.sst", "*.log", ""])
def test_a_truncated_index_costs_nothing(bench: Bench, pattern: str) -> None:
    """It is built anew from the files. Without a pattern all of it is gone."""
    for number in range(4):
        bench.put(number)
    bench.database.close()
    for path in (bench.path / "index").glob(pattern) if pattern else ():
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
    if not pattern:
        shutil.rmtree(bench.path / "index")
    bench.open()
    assert all(bench.get(number) for number in range(4))
    assert bench.put(9)
    assert bench.get(9)


def test_files_that_are_damaged_or_gone_cost_their_chunks_and_nothing_else(bench: Bench) -> None:
    for number in range(4):
        bench.put(number)
    bench.database.close()
    record_path(bench, 0).unlink()
    with record_path(bench, 1).open("r+b") as file:
        file.truncate(RECORD // 2)
    (bench.path / files.FOLDER / "00" / "rubbish").write_bytes(b"x")
    bench.open()
    assert bench.here(0, 1, 2, 3) == [2, 3]
    assert bench.database.held_bytes == 2 * RECORD
    assert left(bench.path) == [key(2).hex(), key(3).hex()]
    assert bench.put(1) and bench.get(1)


@pytest.mark.parametrize("what", ["folder", "pipe", "link", "loop"])
def test_what_others_put_between_the_files_costs_no_more_than_its_chunk(bench: Bench, what: str) -> None:
    def put_there(path: Path) -> None:
        path.unlink(missing_ok=True)
        if what == "folder":
            path.mkdir()
            (path / "theirs").touch()
        elif what == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(path if what == "loop" else bench.path / "nothing")

    assert bench.put(1) and bench.put(2)
    put_there(Path(files.path_of(bench.path, key(1))))
    assert not bench.get(1) and bench.get(2)
    for stranger in ("new/7", "07/theirs", f"00/{key(3).hex()}"):
        put_there(bench.path / "chunks" / stranger)
    bench.database.close()
    bench.open()
    assert not bench.get(1) and bench.get(2) and not bench.database.contains(key(3))
    assert bench.put(4)
    assert bench.put(1) == (what != "folder")


def test_what_could_not_be_synchronised_before_is_not_said_to_be(bench: Bench) -> None:
    assert bench.put(1)
    shutil.rmtree(bench.path / "chunks/00")
    bench.clock.now_s += 2 * TIER_FLUSH_S
    bench.database.tick()
    assert not bench.database.sync()
    assert bench.put(2), "opened anew, with its folders"
    assert bench.database.sync()
    assert not bench.get(1) and bench.get(2)


def test_a_file_in_place_of_a_folder_goes(bench: Bench) -> None:
    bench.database.close()
    (bench.path / "chunks/00").rmdir()
    (bench.path / "chunks/00").touch()
    bench.open()
    assert bench.put(1) and bench.get(1)


def test_the_disk_gets_back_what_was_evicted(bench: Bench) -> None:
    """Ten times the capacity goes through; no more than that lies on the disk."""
    bench.database.capacity_bytes = 16 * MIB
    for number in range(160):
        assert bench.put(number, size=MIB - RECORD_HEADER_BYTES)
    on_disk = sum(path.stat().st_size for path in (bench.path / files.FOLDER).rglob("*") if path.is_file())
    assert on_disk == bench.database.held_bytes <= 16 * MIB
