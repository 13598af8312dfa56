"""What people and programs see of the directory: rows, names, counters."""

from __future__ import annotations

import numpy as np

from metadata_server.chunks import NS, Chunks
from metadata_server.errors import Refusal
from metadata_server.rights import Holdings
from vcache import limits, protocol
from vcache.protocol import ErrorCode
from vcache.table import State


class Listing(Chunks):
    """The requests of those who look."""

    def _list(self, mine: Holdings, rid: int, ask: protocol.List, now_ns: int) -> protocol.Reply:
        limit = min(max(ask.limit, 1), limits.LIST_PAGE_MAX)
        states = self.table.word[: self._records_used()] >> np.uint64(28) & np.uint64(0xF)
        committed = np.flatnonzero(states == State.COMMITTED)
        committed = committed[committed >= ask.cursor][: limit + 1]
        rows = [self._row(index, now_ns) for index in committed[:limit].tolist()]
        return protocol.Listed(rows, int(committed[limit]) if len(committed) > limit else 0)

    def _row(self, index: int, now_ns: int) -> protocol.ChunkRow:
        record = self.table.records[index]
        expiry = int(record["expiry_s"])
        return protocol.ChunkRow(
            key=bytes(record["key"]),
            namespace=bytes(record["namespace"]),
            layout=bytes(record["layout"]),
            segment=int(record["segment"]),
            offset=int(record["offset"]),
            length=int(record["length"]),
            idle_s=max(0, now_ns - int(record["used_ns"])) / NS,
            expires_s=expiry - now_ns / NS if expiry else None,
            pins=int(record["pins"]),
            leases=int(self.rights.leases[index]),
        )

    def _describe(self, mine: Holdings, rid: int, ask: protocol.Describe, now_ns: int) -> protocol.Reply:
        fits = len(ask.digest) <= limits.KEY_BYTES and len(ask.label) <= limits.LABEL_BYTES_MAX
        if not fits or (len(self.labels) >= limits.LABELS_MAX and ask.digest not in self.labels):
            raise Refusal(ErrorCode.LIMIT, "describe: too many names, or one too long")
        self.labels[ask.digest] = ask.label
        return protocol.Done()

    def gauges(self) -> dict[str, float]:
        """Counters since the start, and what there is now."""
        self.catch_up()
        holdings = self.rights.sessions.values()
        rooms = self.allocator.rooms.values()
        return {
            **{name: float(count) for name, count in self.counters.items()},
            "chunks": float(len(self.chunks)),
            "replicas": float(sum(map(len, self.replicas.values()))),
            "reservations": float(sum(len(each.reservations) for each in holdings)),
            "leases": float(sum(len(each.leases) for each in holdings)),
            "pins": float(sum(each.pinned_count for each in holdings)),
            "pinned_bytes": float(sum(each.pinned_bytes for each in holdings)),
            "capacity_bytes": float(sum(room.end - room.begin for room in rooms)),
            "used_bytes": float(sum(room.used_bytes for room in rooms)),
            "table_full": float(self.allocator.table_full),
        }
