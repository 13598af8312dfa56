"""Allocation: slabs, spare room, and a change of layout that leaves at least 95 % usable."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from metadata_server.allocator import Allocator, Slab, extent_size
from tests.support.pool import BOOT, DATA_OFFSET, Pool
from vcache.limits import EXTENT_ALIGN_BYTES, GIB, KIB, MIB, SLABS_PER_SEGMENT
from vcache.protocol import Extents
from vcache.table import ExtentTable, State


@dataclass
class Alone:
    """An allocator without a directory, driven as the directory drives it."""

    table: ExtentTable
    allocator: Allocator

    def take(self, count: int, size: int, near: int = 0) -> list[int]:
        taken = self.allocator.take(count, size, near)
        for index in taken:
            self.table.reserve(index, 1, 1, bytes(16))
        self.allocator.check()
        return taken

    def give_back(self, indices: list[int]) -> None:
        for index in indices:
            self.table.free(index)
            self.allocator.give_back(index)
        self.allocator.check()

    def place(self, index: int) -> tuple[int, int, int]:
        record = self.table.records[index]
        return int(record["segment"]), int(record["offset"]), int(record["size"])

    def sizes(self) -> list[int]:
        return sorted(slab.size for slab in self.allocator.slabs.values())


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Alone]:
    table = ExtentTable.create(tmp_path / "extents", 4096, boot=BOOT)
    yield Alone(table, Allocator(table))
    table.close()


def test_sizes_are_rounded_up_to_pages() -> None:
    assert [extent_size(length) for length in (1, 4095, 4096, 4097, 33 * MIB)] == [
        4096,
        4096,
        4096,
        8192,
        33 * MIB,
    ]


def test_extents_lie_side_by_side_inside_their_segment(alone: Alone) -> None:
    alone.allocator.add_segment(7, 100, MIB, 0)
    taken = alone.take(1000, 16 * KIB)
    places = sorted(map(alone.place, taken))

    assert len(taken) == (MIB - EXTENT_ALIGN_BYTES) // (16 * KIB)
    assert places[0] == (7, EXTENT_ALIGN_BYTES, 16 * KIB)
    assert all(before + size == after for (_, before, size), (_, after, _) in pairwise(places))
    assert places[-1][1] + 16 * KIB <= MIB
    assert alone.allocator.rooms[7].free_bytes == MIB - EXTENT_ALIGN_BYTES - len(taken) * 16 * KIB


def test_a_slab_is_a_share_of_its_segment_but_holds_one_extent_at_least(alone: Alone) -> None:
    alone.allocator.add_segment(1, 0, SLABS_PER_SEGMENT * 64 * KIB, 0)
    alone.take(1, 16 * KIB)
    alone.take(1, MIB)

    assert sorted(len(slab.indices) for slab in alone.allocator.slabs.values()) == [1, 4]


def test_own_segment_first_then_the_roomiest(alone: Alone) -> None:
    for segment, size in ((1, 8), (2, 16), (3, 12)):
        alone.allocator.add_segment(segment, 0, size * 64 * KIB, 0)

    taken = [alone.place(index)[0] for index in alone.take(8 + 16 + 2, 64 * KIB, near=1)]
    assert taken == [1] * 8 + [2] * 16 + [3] * 2
    assert [alone.place(index)[0] for index in alone.take(1, 64 * KIB, near=2)] == [3]
    assert [alone.place(index)[0] for index in alone.take(100, 64 * KIB)] == [3] * 9


def test_high_ranks_are_for_what_low_ones_cannot_take(alone: Alone) -> None:
    alone.allocator.add_segment(1, 0, 2 * MIB, 1)
    alone.allocator.add_segment(2, 0, MIB, 0)

    assert [alone.place(index)[0] for index in alone.take(3, MIB, near=1)] == [2, 1, 1]


def test_a_segment_too_small_for_anything_is_no_harm(alone: Alone) -> None:
    alone.allocator.add_segment(1, 4000, 4200, 0)
    alone.allocator.add_segment(2, 8000, 4200, 0)
    assert alone.take(1, 4 * KIB) == []
    assert alone.allocator.drop_segment(1) == []


def test_an_empty_slab_goes_back_to_any_other_size(alone: Alone) -> None:
    alone.allocator.add_segment(1, 0, MIB, 0)
    small = alone.take(256, 4 * KIB)
    assert len(small) == 256
    assert alone.take(1, 64 * KIB) == []
    alone.give_back(small)

    assert len(alone.take(100, 64 * KIB)) == 16
    assert set(alone.sizes()) == {64 * KIB}


def test_an_extent_is_given_back_and_taken_again_under_a_higher_generation(alone: Alone) -> None:
    alone.allocator.add_segment(1, 0, 64 * KIB, 0)
    (index,) = alone.take(1, 64 * KIB)
    generation = alone.table.generation(index)
    alone.give_back([index])

    assert alone.take(1, 64 * KIB) == [index]
    assert alone.table.generation(index) == generation + 1


def test_records_are_used_again(alone: Alone) -> None:
    alone.allocator.add_segment(1, 0, MIB, 0)
    for size in (4, 8, 16, 4, 32, 12, 4):
        alone.give_back(alone.take(256, size * KIB))
    assert len(alone.table.in_use()) == 256


def test_a_full_table_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    table = ExtentTable.create(tmp_path / "extents", 100, boot=BOOT)
    alone = Alone(table, Allocator(table))
    alone.allocator.add_segment(1, 0, MIB, 0)
    taken = alone.take(256, 4 * KIB)
    assert len(taken) == 100
    assert alone.take(1, 8 * KIB) == []
    assert alone.allocator.table_full > 0
    alone.give_back(taken)
    assert len(alone.take(200, 8 * KIB)) == 100
    table.close()


def test_a_dropped_segment_leaves_no_record_behind(alone: Alone) -> None:
    for segment in (1, 2):
        alone.allocator.add_segment(segment, 0, 256 * KIB, 0)
    taken = alone.take(64 + 64, 4 * KIB, near=1)
    generations = [alone.table.generation(index) for index in taken[:64]]
    gone = alone.allocator.drop_segment(1)
    alone.allocator.check()

    assert sorted(gone) == sorted(taken[:64])
    assert {alone.table.state(index) for index in gone} == {State.EMPTY}
    assert [alone.table.generation(index) for index in taken[:64]] == [each + 1 for each in generations]
    assert not any(alone.allocator.in_slab(index) for index in gone)
    assert all(alone.allocator.in_slab(index) for index in taken[64:])
    alone.allocator.add_segment(3, 0, MIB, 0)
    assert set(gone) <= set(alone.take(64, 4 * KIB))


def test_a_slab_in_use_is_not_given_up(alone: Alone) -> None:
    alone.allocator.add_segment(1, 0, MIB, 0)
    (index,) = alone.take(1, 4 * KIB)
    with pytest.raises(AssertionError):
        alone.allocator.dissolve(alone.allocator.slab_of(index))


def test_a_split_slab_is_the_same_extents(alone: Alone) -> None:
    alone.allocator.add_segment(1, 0, SLABS_PER_SEGMENT * 32 * KIB, 0)
    taken = alone.take(8, 4 * KIB)
    alone.give_back(taken[2:4])
    slab = alone.allocator.slab_of(taken[0])
    content = bytes(alone.table.records.tobytes())
    parts = alone.allocator.split(slab, [False, True, True, True, False, False, True, False])
    alone.allocator.check()

    assert alone.table.records.tobytes() == content
    assert [len(part.indices) for part in parts] == [1, 3, 2, 1, 1]
    assert [index for part in parts for index in part.indices] == slab.indices
    assert sorted(alone.take(2, 4 * KIB)) == sorted(taken[2:4])


# --- room for another size ----------------------------------------------------------------------------------


def windows(alone: Alone, size: int, count: int = 1, held: tuple[int, ...] = ()) -> list[int]:
    """Offsets, in 64 KiB, of the slabs that would be emptied; last used in the order of their offsets."""
    chosen = alone.allocator.windows(
        count, size, lambda slab: slab.offset // (64 * KIB) not in held, lambda slab: slab.offset
    )
    return [slab.offset // (64 * KIB) for slab in chosen]


def test_the_coldest_slabs_are_chosen_if_they_are_filled(alone: Alone) -> None:
    alone.allocator.add_segment(1, 0, 16 * 64 * KIB, 0)
    alone.take(16, 64 * KIB)

    assert windows(alone, 32 * KIB) == [0]
    assert windows(alone, 32 * KIB, held=(0, 1)) == [2]
    assert windows(alone, 32 * KIB, count=5) == [0, 1, 2]
    assert windows(alone, 128 * KIB, held=(1,)) == [2, 3]
    assert windows(alone, 128 * KIB, count=2, held=(1, 4)) == [2, 3, 5, 6]
    assert windows(alone, 1024 * KIB) == list(range(16))
    assert windows(alone, 1024 * KIB, held=(7,)) == []
    assert windows(alone, 1088 * KIB) == []


def test_slabs_that_are_not_filled_are_taken_from_the_lower_end(alone: Alone) -> None:
    alone.allocator.add_segment(1, 0, 16 * 64 * KIB, 0)
    alone.take(16, 64 * KIB)
    chosen = alone.allocator.windows(1, 96 * KIB, lambda slab: True, lambda slab: -slab.offset)

    assert [slab.offset // (64 * KIB) for slab in chosen] == [0, 1]


def test_what_an_extent_leaves_over_is_used_with_the_next_slab(alone: Alone) -> None:
    alone.allocator.add_segment(1, 0, 16 * 64 * KIB, 0)
    taken = alone.take(16, 64 * KIB)
    for _ in range(10):
        chosen = alone.allocator.windows(1, 96 * KIB, lambda slab: True, lambda slab: -slab.offset)
        for slab in chosen:
            alone.give_back(slab.indices)
            taken = [index for index in taken if index not in slab.indices]
            alone.allocator.dissolve(slab)
        assert len(alone.take(1, 96 * KIB)) == 1
    assert alone.allocator.windows(1, 96 * KIB, lambda slab: True, lambda slab: 0) == []


SIZES = [
    (64 * MIB, 2 * MIB, 3 * MIB),
    (64 * MIB, 3 * MIB, 2 * MIB),
    (64 * MIB, MIB, 4 * MIB),
    (256 * MIB, 2 * MIB, 3 * MIB),
    (GIB, 32 * MIB, 20 * MIB),
    (GIB, 20 * MIB, 32 * MIB),
    (GIB, 2 * MIB + 4 * KIB, 3 * MIB),
    (4 * GIB, 32 * MIB, 5 * MIB),
    (4 * GIB, MIB + 4 * KIB, 7 * MIB + 8 * KIB),
    (4 * GIB, 512 * KIB, 32 * MIB),
    (4 * GIB, 32 * MIB, 512 * KIB),
]


def fill(pool: Pool, segment_bytes: int, size: int, form: int) -> Extents:
    """As many chunks of a size as fit."""
    return pool.store(1, *range(form << 20, (form << 20) + segment_bytes // size + 2), size=size, form=form)


@pytest.mark.parametrize(("segment_bytes", "before", "after"), SIZES)
def test_after_a_change_of_layout_everything_is_usable(
    segment_bytes: int, before: int, after: int, tmp_path: Path
) -> None:
    pool = Pool(tmp_path / "extents", capacity=1 << 14, segments=(segment_bytes,))
    pool.checks = False
    for form, size in enumerate((before, after, before, after)):
        used = len(fill(pool, segment_bytes, size, form)) * size
        assert used >= 0.95 * segment_bytes
    pool.directory.check()
    pool.close()


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.2])
@pytest.mark.parametrize(("segment_bytes", "before", "after"), SIZES)
def test_after_a_change_of_layout_all_that_is_not_held_is_usable(
    segment_bytes: int, before: int, after: int, share: float, scattered: bool, tmp_path: Path
) -> None:
    """Of each run between held extents, what the new size can fill; its rest is smaller than one of it."""
    pool = Pool(tmp_path / "extents", capacity=1 << 14, segments=(segment_bytes,))
    pool.checks = False
    extents = fill(pool, segment_bytes, before, 1)
    count = max(1, round(share * len(extents)))
    chosen = random.Random(1).sample(range(len(extents)), count) if scattered else list(range(count))
    held = pool.acquire(2, *((1 << 20) + each for each in chosen), pin=True, prefix=False)
    assert len(held) == count
    got = fill(pool, segment_bytes, after, 2)

    ends = sorted((int(each["offset"]), int(each["offset"]) + before) for each in held)
    bounds = [(0, DATA_OFFSET), *ends, (DATA_OFFSET + segment_bytes, 0)]
    fits = sum((begin - end) // after for (_, end), (begin, _) in pairwise(bounds))
    assert len(got) >= 0.95 * fits
    pool.directory.check()
    pool.close()


def test_two_layouts_in_use_share_a_pool_by_use(tmp_path: Path) -> None:
    """Little is lost to fragments in the long run, and what is used is not what is given up."""
    pool = Pool(tmp_path / "extents", segments=(64 * MIB,))
    pool.checks = False
    rng = random.Random(3)
    stored: list[tuple[int, int]] = []
    for number in range(600):
        form = rng.choice((1, 2))
        pool.store(1, number, size=(2 if form == 1 else 3) * MIB, form=form)
        stored.append((number, form))
    used = sum(slab.size * len(slab.indices) for slab in pool.directory.allocator.slabs.values())
    recent = [number for number, form in stored[-12:] if pool.there(number, form=form)]
    assert used >= 0.85 * 64 * MIB
    assert len(recent) >= 10
    pool.directory.check()
    pool.close()


# --- against a list of bytes --------------------------------------------------------------------------------


class AllocatorAgainstIntervals(RuleBasedStateMachine):
    """Extents never overlap or leave their segments, and everything that is given back can be had again."""

    def __init__(self) -> None:
        super().__init__()
        path = Path("/dev/shm") / f"vcache-test-allocator-{id(self)}"
        self.alone = Alone(ExtentTable.create(path, 700, boot=BOOT), Allocator.__new__(Allocator))
        path.unlink()
        self.alone.allocator = Allocator(self.alone.table)
        self.segments: dict[int, int] = {}
        self.held: dict[int, tuple[int, int, int]] = {}
        self.generations: dict[int, int] = {}
        self.number = 0

    def teardown(self) -> None:
        self.alone.give_back(list(self.held))
        assert sum(room.used_bytes for room in self.alone.allocator.rooms.values()) == 0
        self.alone.table.close()

    @rule(size=st.integers(0, 40), rank=st.integers(0, 1))
    @precondition(lambda self: len(self.segments) < 3)
    def add_segment(self, size: int, rank: int) -> None:
        self.number += 1
        self.alone.allocator.add_segment(self.number, 100, 4 * KIB + size * 32 * KIB, rank)
        self.segments[self.number] = size * 32 * KIB

    @rule(data=st.data())
    @precondition(lambda self: self.segments)
    def drop_segment(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.segments)))
        gone = set(self.alone.allocator.drop_segment(number))
        del self.segments[number]
        assert {index for index, place in self.held.items() if place[0] == number} <= gone
        self.held = {index: place for index, place in self.held.items() if place[0] != number}

    @rule(count=st.integers(1, 60), size=st.sampled_from((1, 2, 3, 5, 8, 32)), near=st.integers(0, 3))
    def take(self, count: int, size: int, near: int) -> None:
        taken = self.alone.take(count, size * 4 * KIB, near)
        assert len(taken) <= count
        for index in taken:
            assert index not in self.held
            segment, offset, length = place = self.alone.place(index)
            assert length == size * 4 * KIB
            assert 4 * KIB <= offset <= offset + length <= 4 * KIB + self.segments[segment]
            assert not any(
                segment == other and offset < at + much and at < offset + length
                for other, at, much in self.held.values()
            )
            assert self.alone.table.generation(index) >= self.generations.get(index, 0)
            self.generations[index] = self.alone.table.generation(index) + 1
            self.held[index] = place

    @rule(data=st.data())
    @precondition(lambda self: self.held)
    def give_back(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.held)), unique=True))
        self.alone.give_back(chosen)
        for index in chosen:
            del self.held[index]

    @rule()
    def give_all_back(self) -> None:
        self.alone.give_back(list(self.held))
        self.held.clear()

    @rule(data=st.data())
    @precondition(lambda self: self.alone.allocator.slabs)
    def split(self, data: st.DataObject) -> None:
        slabs: list[Slab] = sorted(self.alone.allocator.slabs.values(), key=lambda slab: slab.number)
        slab = data.draw(st.sampled_from(slabs))
        many = len(slab.indices)
        self.alone.allocator.split(slab, data.draw(st.lists(st.booleans(), min_size=many, max_size=many)))

    @invariant()
    def adds_up(self) -> None:
        self.alone.allocator.check()
        used = sum(size for _, _, size in self.held.values())
        assert used == sum(room.used_bytes for room in self.alone.allocator.rooms.values())


TestAllocatorAgainstIntervals = AllocatorAgainstIntervals.TestCase
TestAllocatorAgainstIntervals.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
