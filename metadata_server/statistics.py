"""What the server tells of itself: counters, segments, sessions, names."""

from __future__ import annotations

import os
import time

from metadata_server.requests import Requests
from metadata_server.sessions import Sessions
from vcache.limits import SEGMENTS_MAX
from vcache.protocol import SegmentRow, SessionRow, Statistics
from vcache.table import State


def statistics(requests: Requests, sessions: Sessions, started_ns: int) -> Statistics:
    """The reply to `Stats`."""
    counters = requests.directory.gauges()
    counters["requests"] = float(requests.answered)
    counters["refused"] = float(requests.refused)
    counters["uptime_s"] = (time.monotonic_ns() - started_ns) / 1e9
    counters["pid"] = float(os.getpid())
    labels = {digest.hex(): label for digest, label in requests.directory.labels.items()}
    return Statistics(counters, _segments(requests, sessions), _sessions(requests, sessions), labels)


def _segments(requests: Requests, sessions: Sessions) -> list[SegmentRow]:
    table, rooms = requests.directory.table, requests.directory.allocator.rooms
    committed: dict[int, int] = dict.fromkeys(rooms, 0)
    for slab in requests.directory.allocator.slabs.values():
        states = table.word[slab.indices] >> 28 & 0xF
        committed[slab.segment] += int((states == State.COMMITTED).sum()) * slab.size
    rows = []
    for slot in range(SEGMENTS_MAX):
        number = table.segment_in_use(slot)
        if number not in rooms:
            continue
        record, room = table.segments[slot], rooms[number]
        rows.append(
            SegmentRow(
                segment=number,
                segment_id=bytes(record["segment_id"]),
                incarnation=int(record["incarnation"]),
                device=bytes(record["device"]).decode(),
                rank=room.rank,
                session=int(record["session"]),
                size=room.end - room.begin,
                committed_bytes=committed[number],
                reserved_bytes=room.used_bytes - committed[number],
                free_bytes=room.free_bytes,
                held=number in sessions.lent,
            )
        )
    return rows


def _sessions(requests: Requests, sessions: Sessions) -> list[SessionRow]:
    rows = []
    for session, holdings in requests.directory.rights.sessions.items():
        peer = sessions.peers.get(session)
        rows.append(
            SessionRow(
                session=session,
                pid=peer.pid if peer else 0,
                name=peer.name if peer else "(has not come back yet)",
                reservations=len(holdings.reservations),
                leases=len(holdings.leases),
                pins=holdings.pinned_count,
                here=peer is not None and peer.connection is not None,
            )
        )
    return rows
