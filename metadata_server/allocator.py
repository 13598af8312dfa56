"""Which bytes of which segment are whose: segments cut into slabs of equal extents. No clock, no policy, no
I/O but the table.

A slab is a run of equal extents in one segment. Taking and giving back an extent is O(1). A slab without
extents in use is spare: it keeps its shape until another size needs its room. Room between slabs that is
smaller than one extent is slack.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

from vcache.limits import EXTENT_ALIGN_BYTES, SLAB_EXTENTS_MAX, SLABS_PER_SEGMENT
from vcache.table import ExtentTable


@dataclass(eq=False)
class Slab:
    """Equal extents side by side; `free` are the indices that nobody has."""

    number: int
    segment: int
    offset: int
    size: int
    indices: list[int]
    free: list[int]

    @property
    def end(self) -> int:
        """The offset behind its last extent."""
        return self.offset + self.size * len(self.indices)

    @property
    def spare(self) -> bool:
        """Whether none of its extents is in use."""
        return len(self.free) == len(self.indices)

    def __lt__(self, other: Slab) -> bool:
        return self.offset < other.offset


@dataclass(eq=False)
class SegmentRoom:
    """One segment as the allocator sees it: where extents may lie, its slabs by offset, and those with free
    extents by size.
    """

    segment: int
    begin: int
    end: int
    rank: int
    session: int = 0
    numa: int = -1
    slabs: list[Slab] = field(default_factory=list)
    open: dict[int, dict[int, Slab]] = field(default_factory=dict)
    used_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        """Bytes that are not in use, whatever shape they have now."""
        return self.end - self.begin - self.used_bytes

    def gaps(self, passable: Callable[[Slab], bool]) -> Iterator[tuple[int, int, list[Slab]]]:
        """Maximal runs (begin, end, slabs in it) that consist of room between slabs and of passable slabs."""
        begin = self.begin
        inside: list[Slab] = []
        for slab in self.slabs:
            if passable(slab):
                inside.append(slab)
                continue
            if slab.offset > begin:
                yield begin, slab.offset, inside
            begin, inside = slab.end, []
        if self.end > begin:
            yield begin, self.end, inside


def extent_size(length: int) -> int:
    """The size of the extents for chunks of `length` bytes: rounded up to EXTENT_ALIGN_BYTES."""
    return -(-length // EXTENT_ALIGN_BYTES) * EXTENT_ALIGN_BYTES


def slab_extents(room: SegmentRoom, size: int) -> int:
    """How many extents of this size a slab of this segment has, if there is room for as many."""
    share = max((room.end - room.begin) // SLABS_PER_SEGMENT, size)
    return min(share // size, SLAB_EXTENTS_MAX)


class Allocator:
    """Takes and gives back extents; every change goes to the table before it is seen."""

    def __init__(self, table: ExtentTable) -> None:
        self._table = table
        self.rooms: dict[int, SegmentRoom] = {}
        self.slabs: dict[int, Slab] = {}
        self._slab_of: list[Slab | None] = []
        self._slabs_of_size: dict[int, int] = {}
        self._unused: list[int] = []
        self._slab_numbers: list[int] = []
        self.table_full = 0

    # -- segments

    def add_segment(
        self, segment: int, begin: int, end: int, rank: int, session: int = 0, numa: int = -1
    ) -> None:
        """A session lends [begin, end) of a segment to the pool. numa: its NUMA node; -1: unknown."""
        begin = -(-begin // EXTENT_ALIGN_BYTES) * EXTENT_ALIGN_BYTES
        self.rooms[segment] = SegmentRoom(segment, begin, max(begin, end), rank, session, numa)

    def drop_segment(self, segment: int) -> list[int]:
        """Take a segment out with all its extents, whatever their state; returns the indices, EMPTY now."""
        room = self.rooms.pop(segment)
        gone: list[int] = []
        for slab in room.slabs:
            gone.extend(slab.indices)
            self._retire(slab)
        return gone

    def ranks(self) -> list[int]:
        """The ranks of the segments that are there, the lowest first."""
        return sorted({room.rank for room in self.rooms.values()})

    def rank_of(self, index: int) -> int:
        """The rank of the segment that an extent lies in."""
        return self.rooms[self.slab_of(index).segment].rank

    def nearest(self, index: int, rank: int) -> int:
        """Of the segments of a rank on the NUMA node of this extent's segment the roomiest; 0: none is."""
        numa = self.rooms[self.slab_of(index).segment].numa
        near = [room for room in self.rooms.values() if room.rank == rank and room.numa == numa >= 0]
        return max(near, key=lambda room: room.free_bytes).segment if near else 0

    def sizes(self) -> Set[int]:
        """The extent sizes into which slabs are cut now."""
        return self._slabs_of_size.keys()

    # -- extents

    def take(self, count: int, size: int, near: int, rank: int | None = None) -> list[int]:
        """Up to `count` free extents of `size` bytes, FREE in the table still: `near` first, then the
        roomiest segments. rank: only of segments of this rank; None: low ranks first.
        """
        taken: list[int] = []
        for room in self._order(near):
            if rank is not None and room.rank != rank:
                continue
            self._take_from(room, count, size, taken)
            if len(taken) == count:
                break
        return taken

    def _order(self, near: int) -> list[SegmentRoom]:
        """Low ranks first; in a rank the nearest, then by free room."""
        return sorted(
            self.rooms.values(), key=lambda room: (room.rank, room.segment != near, -room.free_bytes)
        )

    def _take_from(self, room: SegmentRoom, count: int, size: int, taken: list[int]) -> None:
        while len(taken) < count:
            slabs = room.open.get(size)
            slab = next(iter(slabs.values())) if slabs else self._cut(room, size)
            if slab is None:
                return
            part = min(count - len(taken), len(slab.free))
            taken.extend(reversed(slab.free[-part:]))
            del slab.free[-part:]
            room.used_bytes += part * size
            if not slab.free:
                self._close(slab)

    def give_back(self, index: int) -> None:
        """The extent (FREE in the table) is nobody's; O(1)."""
        slab = self.slab_of(index)
        slab.free.append(index)
        room = self.rooms[slab.segment]
        room.used_bytes -= slab.size
        room.open.setdefault(slab.size, {})[slab.number] = slab

    def slab_of(self, index: int) -> Slab:
        """The slab that an extent belongs to."""
        slab = self._slab_of[index]
        assert slab is not None, f"extent {index} is in no slab"
        return slab

    def in_slab(self, index: int) -> bool:
        """Whether this record stands for an extent now."""
        return index < len(self._slab_of) and self._slab_of[index] is not None

    # -- slabs

    def _cut(self, room: SegmentRoom, size: int) -> Slab | None:
        """A new slab of this size where there is room, spare slabs of other sizes given up for it."""
        spare_or_none = (lambda slab: False, lambda slab: slab.spare)
        for passable in spare_or_none:
            for begin, end, inside in room.gaps(passable):
                if end - begin >= size:
                    for slab in inside:
                        self.dissolve(slab)
                    cut = self._cut_at(room, begin, end, size)
                    if cut is not None:
                        return cut  # otherwise the table is full: a spare slab's records will do
        return None

    def _cut_at(self, room: SegmentRoom, begin: int, end: int, size: int) -> Slab | None:
        count = min(slab_extents(room, size), (end - begin) // size)
        indices = self._records(count)
        if not indices:
            return None
        for position, index in enumerate(indices):
            self._table.cut(index, room.segment, begin + position * size, size)
        slab = self.adopt(room.segment, begin, size, indices)
        for index in reversed(indices):
            slab.free.append(index)
        room.used_bytes -= size * len(indices)
        room.open.setdefault(size, {})[slab.number] = slab
        return slab

    def adopt(self, segment: int, offset: int, size: int, indices: list[int]) -> Slab:
        """Take up a slab that the table already has, all extents in use; give_back says which are not."""
        number = self._slab_numbers.pop() if self._slab_numbers else len(self.slabs)
        slab = Slab(number, segment, offset, size, indices, [])
        self.slabs[number] = slab
        self._slabs_of_size[size] = self._slabs_of_size.get(size, 0) + 1
        room = self.rooms[segment]
        insort(room.slabs, slab)
        room.used_bytes += size * len(indices)
        if len(self._slab_of) <= max(indices):
            self._slab_of.extend([None] * (max(indices) + 1 - len(self._slab_of)))
        for index in indices:
            self._slab_of[index] = slab
        return slab

    def dissolve(self, slab: Slab) -> None:
        """Give up a spare slab: its records become EMPTY, its bytes room."""
        assert slab.spare, f"slab at {slab.offset} of segment {slab.segment} is in use"
        room = self.rooms[slab.segment]
        self._close(slab)
        room.slabs.remove(slab)
        self._retire(slab)

    def split(self, slab: Slab, apart: Sequence[bool]) -> list[Slab]:
        """Make several slabs of one, cut where `apart` differs between neighbours; no extent changes."""
        room = self.rooms[slab.segment]
        free = set(slab.free)
        if free:
            self._close(slab)
        room.slabs.remove(slab)
        room.used_bytes -= slab.size * (len(slab.indices) - len(free))
        self._forget(slab)
        parts: list[Slab] = []
        for _, run in groupby(zip(apart, slab.indices, strict=True), key=itemgetter(0)):
            indices = [index for _, index in run]
            offset = parts[-1].end if parts else slab.offset
            parts.append(self.adopt(slab.segment, offset, slab.size, indices))
            for index in indices:
                if index in free:
                    self.give_back(index)
        return parts

    def _retire(self, slab: Slab) -> None:
        for index in slab.indices:
            self._table.dissolve(index)
            self._slab_of[index] = None
        self._unused.extend(reversed(slab.indices))
        self._forget(slab)

    def _forget(self, slab: Slab) -> None:
        del self.slabs[slab.number]
        self._slab_numbers.append(slab.number)
        self._slabs_of_size[slab.size] -= 1
        if not self._slabs_of_size[slab.size]:
            del self._slabs_of_size[slab.size]

    def _close(self, slab: Slab) -> None:
        slabs = self.rooms[slab.segment].open[slab.size]
        slabs.pop(slab.number, None)
        if not slabs:
            del self.rooms[slab.segment].open[slab.size]

    # -- records

    def dissolve_records(self, indices: list[int]) -> None:
        """After a restart: these extents are of a segment that has gone."""
        for index in indices:
            self._table.dissolve(index)
        self._unused.extend(indices)

    def forget_records(self, used: int, empty: Iterable[int]) -> None:
        """After a restart: records [0, used) were in use once, `empty` of them stand for nothing now."""
        if len(self._slab_of) < used:
            self._slab_of.extend([None] * (used - len(self._slab_of)))
        self._unused = sorted(empty, reverse=True)

    def _records(self, count: int) -> list[int]:
        """Up to `count` records to write: none if the table, or the file system that it is on, is full."""
        used = len(self._slab_of)
        fresh = min(count - len(self._unused), self._table.capacity - used)
        if fresh > 0 and self._table.ensure(used + fresh):
            self._slab_of.extend([None] * fresh)
            self._unused[:0] = range(used + fresh - 1, used - 1, -1)
        taken = self._unused[-count:]
        del self._unused[len(self._unused) - len(taken) :]
        taken.reverse()
        self.table_full += len(taken) < count
        return taken

    # -- room for another size

    def windows(
        self,
        count: int,
        size: int,
        empties: Callable[[Slab], bool],
        coldness: Callable[[Slab], int],
        rank: int | None = None,
    ) -> list[Slab]:
        """The slabs of other sizes to empty so that some extents of `size` fit, `count` at most: the coldest.

        rank: only in segments of this rank; None: in any.

        empties: whether a slab may be emptied. coldness: its last use. None if not one extent would fit.
        Extents are cut from the beginning of a gap, so a window wastes nothing if they fill it, or if it lies
        at the lower end of what may be emptied or behind slack: then what is left lies beside the next one. A
        change of layout so goes upwards through a segment and loses less than one extent at its end. Only
        where there is no such window one that wastes is taken, and no other with it.
        """
        found: list[tuple[bool, int, int, list[Slab]]] = []
        for room in self.rooms.values():
            if rank is not None and room.rank != rank:
                continue
            for begin, end, inside in room.gaps(
                lambda slab: slab.size != size and (slab.spare or empties(slab))
            ):
                for first, last in _windows(begin, end, inside, size):
                    slabs = inside[first:last]
                    lower = inside[first - 1].end if first else begin
                    upper = inside[last].offset if last < len(inside) else end
                    wasteful = first > 0 and slabs[0].offset == lower and (upper - lower) % size > 0
                    found.append((wasteful, max(map(coldness, slabs)), (upper - lower) // size, slabs))
        found.sort(key=itemgetter(0, 1))
        chosen: dict[Slab, None] = {}
        for wasteful, _, fits, slabs in found:
            if count <= 0 or (wasteful and chosen):
                break
            if chosen.keys().isdisjoint(slabs):
                chosen.update(dict.fromkeys(slabs))
                count -= fits
        return list(chosen)

    def check(self) -> None:
        """Prove that extents do not overlap, that slabs and table agree and that no record is lost."""
        seen: set[int] = set()
        for room in self.rooms.values():
            at, used = room.begin, 0
            for slab in room.slabs:
                assert at <= slab.offset and slab.end <= room.end, (
                    f"slab at {slab.offset} overlaps or leaves its segment"
                )
                at = slab.end
                used += (len(slab.indices) - len(slab.free)) * slab.size
                assert len(set(slab.free)) == len(slab.free) and set(slab.free) <= set(slab.indices)
                is_open = slab.number in room.open.get(slab.size, {})
                assert is_open == bool(slab.free), (
                    f"slab {slab.number}: open={is_open}, {len(slab.free)} free"
                )
                for position, index in enumerate(slab.indices):
                    assert index not in seen, f"extent {index} is in two slabs"
                    seen.add(index)
                    assert self._slab_of[index] is slab
                    record = self._table.records[index]
                    assert (
                        record["offset"] == slab.offset + position * slab.size and record["size"] == slab.size
                    )
                    assert record["segment"] == room.segment
            assert used == room.used_bytes, (
                f"segment {room.segment}: {room.used_bytes} bytes used, counted {used}"
            )
        assert self._slabs_of_size == Counter(slab.size for slab in self.slabs.values())
        assert not seen & set(self._unused) and len(set(self._unused)) == len(self._unused)
        assert len(seen) + len(self._unused) == len(self._slab_of), "a record is neither in a slab nor unused"


def _windows(begin: int, end: int, inside: list[Slab], size: int) -> Iterator[tuple[int, int]]:
    """Minimal runs inside[first:last] that, with the room around them, hold one extent of `size`."""
    last = 0
    for first in range(len(inside)):
        lower = inside[first - 1].end if first else begin
        last = max(last, first + 1)
        while last < len(inside) and inside[last].offset - lower < size:
            last += 1
        upper = inside[last].offset if last < len(inside) else end
        if upper - lower >= size:
            yield first, last
