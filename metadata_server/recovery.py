"""A directory from a table that an earlier server left: chunks, reservations and pins go on, slabs are found
again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from metadata_server.allocator import slab_extents
from metadata_server.directory import NS, Directory, Policy
from vcache.limits import SEGMENTS_MAX
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
                number,
                int(record["data_offset"]),
                int(record["size"]),
                int(record["rank"]),
                int(record["session"]),
                int(record["numa"]) - 1,
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
    if not len(indices):
        return
    records = directory.table.records
    columns = [records[name][indices].astype(np.int64) for name in ("segment", "offset", "size")]
    order = np.lexsort((columns[1], columns[0]))
    indices = indices[order]
    segment, offset, size = (column[order] for column in columns)
    end = offset + size
    same = segment[1:] == segment[:-1]
    if (same & (end[:-1] > offset[1:])).any() or (size <= 0).any():
        raise TableDamaged("extents overlap, or one has no size")
    beside = same & (end[:-1] == offset[1:]) & (size[1:] == size[:-1])
    starts = np.flatnonzero(np.concatenate(([True], ~beside))).tolist()
    for first, last in zip(starts, [*starts[1:], len(indices)], strict=True):
        place = int(segment[first]), int(offset[first]), int(size[first])
        _adopt(directory, indices[first:last].tolist(), *place)


def _adopt(directory: Directory, run: list[int], segment: int, offset: int, size: int) -> None:
    room = directory.allocator.rooms.get(segment)
    if room is None:
        directory.table.pins[run] = 0
        directory.allocator.dissolve_records(run)
        return
    if offset < room.begin or offset + size * len(run) > room.end:
        raise TableDamaged(f"extents at byte {offset} of segment {segment} leave it")
    step = slab_extents(room, size)
    for at in range(0, len(run), step):
        directory.allocator.adopt(segment, offset + at * size, size, run[at : at + step])


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
    committed: list[int] = []
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
            committed.append(index)
    directory.prepare_grants(committed)
