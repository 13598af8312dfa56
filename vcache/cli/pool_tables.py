"""What the server says of itself, as tables: for `stats` and `top`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vcache.cli import present
from vcache.protocol import SegmentRow, SessionRow, Statistics

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def holders(statistics: Statistics) -> dict[int, SessionRow]:
    """Sessions by their id."""
    return {row.session: row for row in statistics.sessions}


def summary(statistics: Statistics, where: str) -> Text:
    """Two lines: the server, and the pool as a whole."""
    count = statistics.counters.get
    used, capacity = count("used_bytes", 0.0), count("capacity_bytes", 0.0)
    server = [
        f"server {count('pid', 0.0):.0f}",
        f"up {present.duration(count('uptime_s', 0.0))}",
        f"{count('requests', 0.0):,.0f} requests ({count('refused', 0.0):,.0f} refused)",
        where,
    ]
    pool = [
        f"pool {present.size(used)} of {present.size(capacity)} ({present.share(used, capacity)})",
        f"{count('chunks', 0.0):,.0f} chunks",
        f"hit rate {present.share(count('hit_chunks', 0.0), count('wanted_chunks', 0.0))}",
        f"{count('evicted', 0.0):,.0f} evicted ({count('evicted_unsaved', 0.0):,.0f} that nobody had saved)"
        if count("evicted_unsaved", 0.0)
        else f"{count('evicted', 0.0):,.0f} evicted",
        f"{present.size(count('pinned_bytes', 0.0))} pinned",
    ]
    return present.lines(" · ".join(server), " · ".join(pool))


def segments(statistics: Statistics) -> Table:
    """One line for each segment: device, size, fill, holder."""
    made = present.table(
        "segments", ">segment", "device", ">rank", ">size", "committed", ">reserved", ">free", "holder"
    )
    sessions = holders(statistics)
    for row in statistics.segments:
        present.add_row(
            made,
            [
                row.segment,
                short_label(row.device),
                row.rank,
                present.size(row.size),
                present.bar(row.committed_bytes, row.size),
                present.size(row.reserved_bytes),
                present.size(row.free_bytes),
                _holder(row, sessions.get(row.session)),
            ],
        )
    if not statistics.segments:
        made.caption = (
            "none: nothing can be stored; lend one with `vcache segment --device shm:0 --size 2GiB`"
        )
    return made


def short_label(device: str) -> str:
    """A device's label for a column: of a GPU's UUID the first digits, which people compare; shm as it is."""
    kind, _, uuid = device.partition(":")
    return f"{kind}:{uuid[: len('GPU-01234567')]}" if kind == "cuda" else device


def _holder(row: SegmentRow, session: SessionRow | None) -> str:
    if session is None or not session.pid:
        return "(gone)" if not row.held else "(not back yet)"
    return f"{session.pid} {session.name}" + ("" if row.held else " (not back yet)")


def sessions(statistics: Statistics, *, leave_out_pid: int = 0) -> Table:
    """One line for each session: process, name, what it holds. leave_out_pid: the process that asks."""
    made = present.table("sessions", ">pid", "name", ">reservations", ">leases", ">pins", "state")
    for row in statistics.sessions:
        if row.pid != leave_out_pid:
            state = "connected" if row.here else "away"
            present.add_row(made, [row.pid or "–", row.name, row.reservations, row.leases, row.pins, state])
    return made


def counters(statistics: Statistics) -> Table:
    """Every counter and gauge, by name."""
    made = present.table("counters", "name", ">value")
    for name, value in sorted(statistics.counters.items()):
        present.add_row(made, [name, f"{value:,.0f}" if value == int(value) else f"{value:,.3f}"])
    return made
