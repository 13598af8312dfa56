"""A directory from a table that an earlier server left: chunks, reservations and pins go on, slabs are found
again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from metadata_server.directory import NS, Directory, Policy
from vcache.limits import SEGMENTS_MAX, SLAB_EXTENTS_MAX, SLABS_PER_SEGMENT
from vcache.table import ExtentTable, State, TableDamaged


def restore(table: ExtentTable, policy: Policy) -> Directory:
    """The directory that the table describes. Raises TableDamaged if its records contradict each other.

    Afterwards the caller says who still lives (`Directory.await_sessions`).
    """
    directory = Directory(table, policy)
    for slot in range(SEGMENTS_MAX):
        number = table.segment_in_use(slot)
        if number:
            record = table.segments[slot]
            directory.allocator.add_segment(
                number, int(record["data_offset"]), int(record["size"]), int(record["rank"])
            )
            directory.rights.of(int(record["session"]))
    indices = table.in_use()
    states = _states(table, indices)
    used = int(indices[-1]) + 1 if len(indices) else 0
    directory.allocator.forget_records(used, set(range(used)) - set(indices[states != State.EMPTY].tolist()))
    _find_slabs(directory, indices[states != State.EMPTY])
    _take_up_extents(directory)
    return directory


def _states(table: ExtentTable, indices: NDArray[np.intp]) -> NDArray[np.uint64]:
    states: NDArray[np.uint64] = table.word[indices] >> np.uint64(28) & np.uint64(0xF)
    return states


def _find_slabs(directory: Directory, indices: NDArray[np.intp]) -> None:
    """Group the extents into slabs again: runs of equal size, side by side, no longer than a slab is cut."""
    records = directory.table.records
    places = np.stack(
        [indices, *(records[name][indices].astype(np.int64) for name in ("segment", "offset", "size"))]
    )
    run: list[_Place] = []
    for place in map(_Place._make, places[:, np.lexsort((places[2], places[1]))].T.tolist()):
        if run and not _continues(directory, run, place):
            _adopt(directory, run)
            run = []
        run.append(place)
    if run:
        _adopt(directory, run)


class _Place(NamedTuple):
    record: int
    segment: int
    offset: int
    size: int


def _continues(directory: Directory, run: list[_Place], place: _Place) -> bool:
    last = run[-1]
    if last.segment != place.segment:
        return False
    if last.offset + last.size > place.offset:
        raise TableDamaged(f"extents overlap at byte {place.offset} of segment {place.segment}")
    room = directory.allocator.rooms.get(place.segment)
    share = max((room.end - room.begin) // SLABS_PER_SEGMENT, place.size) if room else 0
    beside = last.offset + last.size == place.offset and last.size == place.size
    return beside and len(run) < min(share // place.size, SLAB_EXTENTS_MAX)


def _adopt(directory: Directory, run: list[_Place]) -> None:
    indices = [place.record for place in run]
    _, segment, offset, size = run[0]
    room = directory.allocator.rooms.get(segment)
    if room is None:
        directory.allocator.dissolve_records(indices)
        return
    if offset < room.begin or offset + size * len(run) > room.end or size <= 0:
        raise TableDamaged(f"extents at byte {offset} of segment {segment} leave it")
    directory.allocator.adopt(segment, offset, size, indices)


def _take_up_extents(directory: Directory) -> None:
    """In the order of their last use, so that eviction goes on where it was."""
    table = directory.table
    indices = np.array([i for slab in directory.allocator.slabs.values() for i in slab.indices], np.intp)
    indices = indices[np.argsort(table.used_ns[indices], kind="stable")]
    columns = [
        table.records[name][indices].tolist()
        for name in ("session", "rid", "layout", "used_ns", "expiry_s", "pins")
    ]
    states = _states(table, indices).tolist()
    for index, state, session, rid, layout, used_ns, expiry_s, pins in zip(
        indices.tolist(), states, *columns, strict=True
    ):
        if pins and state in (State.COMMITTED, State.ORPHANED):
            directory.rights.inherited.add(index)
        if state == State.ORPHANED and not pins:
            table.free(index)
            state = State.FREE
        if state == State.FREE:
            directory.allocator.give_back(index)
            continue
        directory.set_layout(index, layout)
        if state == State.RESERVED:
            directory.rights.of(session).reservations[index] = rid
        elif state == State.COMMITTED:
            directory.adopt_chunk(index, table.key(index), used_ns, expiry_s * NS)
