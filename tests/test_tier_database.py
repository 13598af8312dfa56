"""The database of the local tier, in this process: index, room, age, damage, a disk that is full."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from vcache.limits import MIB, RECORD_HEADER_BYTES
from vcache.tiers.record import Header, flaw_of, header_for, read_header
from vcache.tiers.rocksdb.database import SWEEP_S, Busy, Database

LAYOUT, OTHER = b"L" * 16, b"O" * 16
SIZE = 64 << 10
RECORD = SIZE + RECORD_HEADER_BYTES


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def chunk(number: int, size: int = SIZE) -> bytes:
    return bytes([number % 251]) * size


def is_right(record: bytes, number: int) -> bool:
    """Whether a reader would take this record for that chunk."""
    header = read_header(record[:RECORD_HEADER_BYTES])
    return isinstance(header, Header) and not flaw_of(
        header, key(number), LAYOUT, record[RECORD_HEADER_BYTES:]
    )


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
        return self.database.put(header.pack() + content)

    def get(self, number: int, layout: bytes = LAYOUT) -> bool:
        """Whether it is here; that its bytes are right is asserted."""
        self.clock.now_s += 0.001
        found = self.database.get(key(number), layout)
        if found is None:
            return False
        assert is_right(found[0], number)
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
    assert not bench.get(1)
    bench.database.ttl_s = 0
    assert bench.here(1, 2) == [2], "one that was asked for after its time is gone for good"


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


def test_another_layout_is_a_miss_and_deleted(bench: Bench) -> None:
    bench.put(1)
    assert not bench.get(1, OTHER)
    assert not bench.get(1)
    assert bench.database.counters["damaged"] == 1


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


def test_what_is_no_record_is_not_kept(bench: Bench) -> None:
    content = chunk(1)
    header = header_for(key(1), LAYOUT, content, 1)
    assert not bench.database.put(content)
    assert not bench.database.put(header.pack() + content[:-1])
    assert bench.database.counters["failed"] == 2
    assert len(bench.database) == 0


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


def test_damaged_bytes_are_a_miss_and_deleted(bench: Bench) -> None:
    for number in range(4):
        bench.put(number)
    bench.database.close()
    blob = max((bench.path / "db").glob("*.blob"), key=lambda path: path.stat().st_size)
    flip(blob, blob.stat().st_size // 3)
    bench.open()
    seen = []
    for number in range(4):
        found = bench.database.get(key(number), LAYOUT)
        seen.append(found is not None and is_right(found[0], number))
        assert found is None or seen[-1] == (found[0][RECORD_HEADER_BYTES:] == chunk(number))
    assert seen.count(True) == 3


@pytest.mark.parametrize("pattern", ["MANIFEST-*", "CURRENT", "*.sst", "*.blob"])
def test_a_truncated_file_costs_chunks_and_nothing_else(bench: Bench, pattern: str) -> None:
    for number in range(4):
        bench.put(number)
    bench.database.close()
    for path in (bench.path / "db").glob(pattern):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
    bench.open()
    for number in range(4):
        found = bench.database.get(key(number), LAYOUT)
        assert found is None or found[0][RECORD_HEADER_BYTES:] == chunk(number)
    assert bench.put(9)
    assert bench.get(9)


def test_a_missing_file_costs_chunks_and_nothing_else(bench: Bench) -> None:
    for number in range(4):
        bench.put(number)
    bench.database.close()
    for path in (bench.path / "db").glob("*.blob"):
        path.unlink()
    bench.open()
    assert not any(bench.get(number) for number in range(4))
    assert bench.put(9)
    assert bench.get(9)


def test_the_disk_gets_back_what_was_evicted(bench: Bench) -> None:
    """Ten times the capacity goes through; what lies on the disk stays within twice of it and some files."""
    capacity = 16 * MIB
    bench.database.close()
    shutil.rmtree(bench.path / "db")
    database = bench.open(capacity)
    for number in range(10 * capacity // MIB):
        while True:
            try:
                assert bench.put(number, size=MIB - RECORD_HEADER_BYTES)
                break
            except Busy:
                bench.clock.now_s += 0.1
        if number % 4 == 0:
            database.sync()
    database.sync()
    assert database.held_bytes <= capacity
    on_disk = sum(path.stat().st_size for path in (bench.path / "db").glob("*.blob"))
    assert on_disk <= 2 * capacity + 8 * MIB
