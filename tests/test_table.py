"""The extent table: every record whole at any instant, damage found, and the readers' fence."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.pool import BOOT, key, layout, namespace
from tests.support.torn import instants, leave
from vcache.errors import RemoteProtocolError
from vcache.limits import KIB, SEGMENTS_MAX
from vcache.table import ExtentTable, Standing, State, TableDamaged, TableReader, retire, word_of

CAPACITY = 64
HEADER_BYTES = 4 * KIB
EXTENTS_AT = HEADER_BYTES + SEGMENTS_MAX * 128


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "extents"


@pytest.fixture
def table(path: Path) -> Iterator[ExtentTable]:
    table = ExtentTable.create(path, CAPACITY, boot=BOOT)
    assert table.ensure(CAPACITY)
    yield table
    if hasattr(table, "records"):
        table.close()


def reader_of(path: Path) -> TableReader:
    return TableReader(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def write_segment(table: ExtentTable, slot: int = 0, number: int = 1) -> None:
    table.write_segment(
        slot,
        number,
        segment_id=b"segment-id-16-by",
        incarnation=7,
        size=1 << 30,
        data_offset=4 * KIB,
        session=11,
        rank=1,
        device="shm:0",
    )


def to_free(table: ExtentTable) -> None:
    table.cut(3, 1, 8 * KIB, 4 * KIB)


def to_reserved(table: ExtentTable) -> None:
    to_free(table)
    table.reserve(3, session=(1 << 63) - 1, rid=(1 << 64) - 1, layout=layout(1))


def to_committed(table: ExtentTable) -> None:
    to_reserved(table)
    table.commit(3, key(9), (1 << 32) - 1, namespace(4), expiry_s=(1 << 32) - 1, used_ns=5)


def to_orphaned(table: ExtentTable) -> None:
    to_committed(table)
    table.orphan(3)


def to_empty_again(table: ExtentTable) -> None:
    to_committed(table)
    table.dissolve(3)


def nothing(table: ExtentTable) -> None:
    pass


TRANSITIONS: dict[str, tuple[Callable[[ExtentTable], None], Callable[[ExtentTable], object]]] = {
    "cut": (nothing, to_free),
    "cut again": (to_empty_again, lambda table: table.cut(3, 2, 64 * KIB, 8 * KIB)),
    "reserve": (to_free, lambda table: table.reserve(3, 2, 3, layout(2))),
    "reserve again": (
        lambda table: (to_committed(table), table.free(3))[0],
        lambda table: table.reserve(3, 2, 3, layout(2)),
    ),
    "commit": (to_reserved, lambda table: table.commit(3, key(1), 77, namespace(1), 0, 9)),
    "orphan": (to_committed, lambda table: table.orphan(3)),
    "free reserved": (to_reserved, lambda table: table.free(3)),
    "free committed": (to_committed, lambda table: table.free(3)),
    "free orphaned": (to_orphaned, lambda table: table.free(3)),
    "dissolve free": (to_free, lambda table: table.dissolve(3)),
    "dissolve committed": (to_committed, lambda table: table.dissolve(3)),
    "write segment": (nothing, write_segment),
    "write segment again": (
        lambda table: (write_segment(table), table.drop_segment(0))[0],
        lambda table: write_segment(table, number=2),
    ),
    "drop segment": (write_segment, lambda table: table.drop_segment(0)),
}


def reading(table: ExtentTable) -> tuple[object, ...]:
    """What a record and a segment's record say: only the fields that their states read."""
    fields = {
        State.EMPTY: (),
        State.FREE: ("segment", "offset", "size"),
        State.RESERVED: ("segment", "offset", "size", "session", "rid", "layout"),
        State.ORPHANED: ("segment", "offset", "size", "session", "rid", "layout"),
        State.COMMITTED: table.records.dtype.names[3:],
    }[table.state(3)]
    number = table.segment_in_use(0)
    segment = table.segments[0].tolist()[1:] if number else ()
    record = [table.records[name][3].tolist() for name in fields]
    return table.state(3), table.generation(3), tuple(record), number, table.next_segment(), segment


@pytest.mark.parametrize("name", TRANSITIONS)
def test_a_kill_at_any_instant_leaves_a_record_as_it_was_or_as_it_becomes(
    name: str, table: ExtentTable, path: Path
) -> None:
    prepare, change = TRANSITIONS[name]
    prepare(table)
    was = reading(table)
    contents = instants(table, lambda: change(table))
    becomes = reading(table)

    found = []
    for content in contents:
        with_torn = ExtentTable.open(leave(path, content), boot=BOOT)
        found.append(reading(with_torn))
        with_torn.close()
    assert found[0] == was
    assert found[-1] == becomes
    assert was != becomes
    assert set(found) == {was, becomes}
    assert found == sorted(found, key=lambda each: each == becomes), "it went back"


def test_what_was_written_is_read_back(table: ExtentTable, path: Path) -> None:
    write_segment(table)
    to_committed(table)
    table.pins[3] = 2
    lineage = table.lineage
    table.close()

    again = ExtentTable.open(path, boot=BOOT)
    assert (again.lineage, again.capacity) == (lineage, CAPACITY)
    assert again.state(3) is State.COMMITTED
    assert again.key(3) == key(9)
    assert bytes(again.records["layout"][3]) == layout(1)
    assert bytes(again.records["namespace"][3]) == namespace(4)
    assert int(again.records["rid"][3]) == (1 << 64) - 1
    assert int(again.length[3]) == int(again.records["expiry_s"][3]) == (1 << 32) - 1
    assert (int(again.pins[3]), int(again.used_ns[3])) == (2, 5)
    assert again.segment_in_use(0) == 1
    assert again.in_use().tolist() == [3]
    again.close()


def test_a_table_that_nobody_used_is_a_table(tmp_path: Path) -> None:
    for directory in (tmp_path, Path("/dev/shm")):
        path = directory / f"vcache-test-{os.getpid()}"
        try:
            ExtentTable.create(path, CAPACITY, boot=BOOT).close()
            again = ExtentTable.open(path, boot=BOOT)
            assert again.in_use().tolist() == []
            again.close()
        finally:
            path.unlink()


def test_a_table_on_tmpfs_is_found_again_however_far_it_was_used() -> None:
    path = Path("/dev/shm") / f"vcache-test-{os.getpid()}"
    try:
        table = ExtentTable.create(path, 100_000, boot=BOOT)
        assert table.ensure(40_000)
        for index in range(20_000):
            table.cut(index, 1, index * 4 * KIB, 4 * KIB)
        assert os.fstat(table.fd).st_blocks * 512 < 60_000 * 128
        table.close()
        again = ExtentTable.open(path, boot=BOOT)
        assert len(again.in_use()) == 20_000
        again.close()
    finally:
        path.unlink()


def test_ensure_says_no_where_no_memory_is_to_be_had(path: Path) -> None:
    table = ExtentTable.create(path, 100_000, boot=BOOT)
    assert table.ensure(10_000)
    # As if its file system were full:
    writable, table.fd = table.fd, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    assert not table.ensure(30_000)
    assert table.ensure(10_000)
    table.cut(9_999, 1, 0, 4 * KIB)
    os.close(table.fd)
    table.fd = writable
    assert table.ensure(30_000)
    table.close()


def test_a_segments_number_is_never_used_twice(table: ExtentTable) -> None:
    numbers = []
    for slot in (0, 1, 0, 0, 5):
        if table.segment_in_use(slot):
            table.drop_segment(slot)
        numbers.append(table.next_segment())
        write_segment(table, slot, numbers[-1])
    assert numbers == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("prepare", [nothing, to_reserved, to_committed, to_orphaned])
def test_an_illegal_transition_is_a_mistake_of_ours_and_changes_nothing(
    prepare: Callable[[ExtentTable], None], table: ExtentTable
) -> None:
    prepare(table)
    was = reading(table)
    state = table.state(3)
    legal = {
        State.EMPTY: {"cut"},
        State.RESERVED: {"commit", "free"},
        State.COMMITTED: {"orphan", "free"},
        State.ORPHANED: {"free"},
    }[state]
    changes: dict[str, Callable[[], object]] = {
        "cut": lambda: table.cut(3, 1, 0, 4 * KIB),
        "reserve": lambda: table.reserve(3, 1, 1, layout(1)),
        "commit": lambda: table.commit(3, key(1), 1, namespace(1), 0, 0),
        "orphan": lambda: table.orphan(3),
        "free": lambda: table.free(3),
    }
    for name in changes.keys() - legal:
        with pytest.raises(AssertionError):
            changes[name]()
    assert reading(table) == was


# --- damage -------------------------------------------------------------------------------------------------


def filled(path: Path) -> bytes:
    table = ExtentTable.create(path, CAPACITY, boot=BOOT)
    table.ensure(CAPACITY)
    write_segment(table)
    for index in range(CAPACITY):
        table.cut(index, 1, index * 4 * KIB, 4 * KIB)
        if index % 4:
            table.reserve(index, 1, index, layout(1))
        if index % 4 > 1:
            table.commit(index, key(index), 100, namespace(1), 0, 1)
        if index % 4 > 2:
            table.orphan(index)
    table.close()
    return path.read_bytes()


CHECKED = {0: (0, 8, 24, 48), 1: (0, 8, 24, 80), 2: (0, 8, 24, 128), 3: (0, 8, 24, 80)}


@pytest.mark.parametrize("index", CHECKED)
def test_a_flipped_bit_in_what_a_state_reads_is_found(index: int, path: Path) -> None:
    content = filled(path)
    word_from, word_to, from_, to = CHECKED[index]
    for offset in [*range(word_from, word_to), *range(from_, to)]:
        at = EXTENTS_AT + index * 128 + offset
        flipped = bytearray(content)
        flipped[at] ^= 1 << offset % 8
        with pytest.raises(TableDamaged, match=r"does not match its check|unknown state"):
            ExtentTable.open(leave(path, bytes(flipped)), boot=BOOT)


@pytest.mark.parametrize("offset", [0, 3, 7, 8, 16, 40, 60, 127])
def test_a_flipped_bit_in_a_segments_record_is_found(offset: int, path: Path) -> None:
    content = bytearray(filled(path))
    content[HEADER_BYTES + offset] ^= 4
    with pytest.raises(TableDamaged):
        ExtentTable.open(leave(path, bytes(content)), boot=BOOT)


def test_what_no_state_reads_may_be_anything(path: Path) -> None:
    content = bytearray(filled(path))
    content[EXTENTS_AT + 48 : EXTENTS_AT + 128] = bytes(range(80))
    content[EXTENTS_AT + 8 : EXTENTS_AT + 24] = b"\xff" * 16
    ExtentTable.open(leave(path, bytes(content)), boot=BOOT).close()


def test_every_byte_of_the_header_counts(path: Path) -> None:
    content = filled(path)
    for at in range(76):
        flipped = bytearray(content)
        flipped[at] ^= 0x10
        with pytest.raises(TableDamaged):
            ExtentTable.open(leave(path, bytes(flipped)), boot=BOOT)


def test_a_table_of_another_boot_is_not_taken(path: Path) -> None:
    filled(path)
    with pytest.raises(TableDamaged, match="another boot"):
        ExtentTable.open(path, boot=b"another")
    with pytest.raises(TableDamaged, match="another boot"):
        ExtentTable.open(path)


@pytest.mark.parametrize(
    "size", [0, 1, 71, 75, 76, HEADER_BYTES, EXTENTS_AT - 1, EXTENTS_AT, EXTENTS_AT + 127, -1]
)
def test_a_truncated_file_is_not_taken(size: int, path: Path) -> None:
    content = filled(path)
    with pytest.raises(TableDamaged):
        ExtentTable.open(leave(path, content[:size]), boot=BOOT)


def test_a_longer_file_is_not_taken(path: Path) -> None:
    with pytest.raises(TableDamaged, match="wanted"):
        ExtentTable.open(leave(path, filled(path) + b"\0"), boot=BOOT)


def test_an_unknown_state_is_not_taken(path: Path) -> None:
    content = bytearray(filled(path))
    word = word_of(5, 9, b"")
    content[EXTENTS_AT : EXTENTS_AT + 8] = word.to_bytes(8, "little")
    with pytest.raises(TableDamaged, match="unknown state 9"):
        ExtentTable.open(leave(path, bytes(content)), boot=BOOT)


def test_no_table_is_not_a_damaged_one(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ExtentTable.open(path)


def test_no_descriptor_is_lost_on_a_table_that_is_not_taken(path: Path) -> None:
    content = filled(path)
    open_before = len(os.listdir("/proc/self/fd"))
    for damaged in (
        content[:100],
        content[:-1],
        content[: EXTENTS_AT + 30] + b"\xff" + content[EXTENTS_AT + 31 :],
    ):
        with pytest.raises(TableDamaged):
            ExtentTable.open(leave(path, damaged), boot=BOOT)
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_table_closes_while_an_error_still_looks_at_it(table: ExtentTable) -> None:
    to_committed(table)
    record = table.records[3]
    table.close()
    assert int(record["length"]) == (1 << 32) - 1


# --- the fence ----------------------------------------------------------------------------------------------


def unchanged(reader: TableReader, index: int, generation: int) -> bool:
    same = reader.unchanged(np.array([index], np.uint32), np.array([generation], np.uint32))
    assert same.dtype == np.bool_
    return bool(same[0])


def test_the_fence_holds_while_an_extent_is_the_same_and_breaks_before_it_is_anybody_elses(
    table: ExtentTable, path: Path
) -> None:
    reader = reader_of(path)
    to_committed(table)
    generation = table.generation(3)
    assert unchanged(reader, 3, generation)
    table.orphan(3)
    assert unchanged(reader, 3, generation), "orphaned: still the same bytes"
    table.free(3)
    assert not unchanged(reader, 3, generation)
    assert unchanged(reader, 3, table.reserve(3, 1, 1, layout(1)))
    table.dissolve(3)
    assert not unchanged(reader, 3, generation + 1)


def test_a_reader_sees_what_has_become_of_a_chunk(table: ExtentTable, path: Path) -> None:
    reader = reader_of(path)
    to_committed(table)
    generation = table.generation(3)
    assert reader.standing(3, generation) is Standing.THERE
    table.orphan(3)
    assert reader.standing(3, generation) is Standing.REMOVED
    table.free(3)
    assert reader.standing(3, generation) is Standing.LOST


def test_of_a_retired_table_nobody_knows_what_has_become_of_its_chunks(
    table: ExtentTable, path: Path
) -> None:
    reader = reader_of(path)
    to_committed(table)
    retire(path)
    assert reader.standing(3, table.generation(3)) is Standing.LOST


def test_the_fence_of_a_retired_table_is_broken_everywhere(table: ExtentTable, path: Path) -> None:
    reader = reader_of(path)
    to_committed(table)
    assert reader.in_force
    retire(path)
    assert not reader.in_force
    assert not unchanged(reader, 3, table.generation(3))


def test_a_new_table_at_the_same_path_breaks_the_old_ones_fence(table: ExtentTable, path: Path) -> None:
    reader = reader_of(path)
    to_committed(table)
    other = ExtentTable.create(path, CAPACITY, boot=BOOT)
    assert other.lineage != table.lineage
    assert not unchanged(reader, 3, table.generation(3))
    assert reader_of(path).in_force
    other.close()


def test_the_fence_looks_at_each_extent_by_itself(table: ExtentTable, path: Path) -> None:
    reader = reader_of(path)
    for index in range(6):
        table.cut(index, 1, index * 4 * KIB, 4 * KIB)
        table.reserve(index, 1, index, layout(1))
    table.free(2)
    table.free(4)
    index = np.array([0, 4, 2, 5, CAPACITY - 1], np.uint32)
    generation = np.zeros(5, np.uint32)
    assert reader.unchanged(index, generation).tolist() == [True, False, False, True, True]
    assert reader.unchanged(index.astype(np.int64), generation.astype(np.uint64)).tolist() == [
        True,
        False,
        False,
        True,
        True,
    ]
    assert reader.unchanged(index[:0], generation[:0]).tolist() == []


def test_generations_wrap_after_32_bits(table: ExtentTable, path: Path) -> None:
    to_reserved(table)
    table._store(3, (1 << 32) - 1, State.RESERVED)
    reader = reader_of(path)
    assert unchanged(reader, 3, (1 << 32) - 1)
    table.free(3)
    assert table.generation(3) == 0
    assert not unchanged(reader, 3, (1 << 32) - 1)
    table.close()
    ExtentTable.open(path, boot=BOOT).close()


@pytest.mark.parametrize("damage", [b"", b"short", bytes(4096), b"\xff" * 50_000])
def test_a_client_refuses_what_is_no_table(damage: bytes, path: Path) -> None:
    path.write_bytes(damage)
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RemoteProtocolError, match="extent table"):
        reader_of(path)
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_client_refuses_a_table_shorter_than_it_says(path: Path) -> None:
    content = filled(path)
    with pytest.raises(RemoteProtocolError, match="extent table"):
        reader_of(leave(path, content[:-128]))
