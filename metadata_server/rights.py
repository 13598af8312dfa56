"""Who may write or read which extents: reservations, leases and pins, by session. No I/O, no clock.

- A **reservation** has no deadline: memory cannot refuse a late write. It is in the table, under the
  session's id.
- A **lease** ends by itself; the reader's fence makes it a courtesy.
- A **pin** has no deadline and is limited in bytes. Its count is in the table, so that a restarted server
  keeps off what anybody had pinned until everybody who lives has said what he still pins.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vcache.limits import HEADS_PER_SESSION_MAX
from vcache.protocol import HANDLE, Declare, unpack
from vcache.table import ExtentTable

Indices = NDArray[np.intp]

_LEASE_ENDS_SPARE = 1_024
_NONE = np.zeros(0, np.intp)


@dataclass(eq=False)
class Holdings:
    """What one session holds. reservations: extent → rid; pins: rid → extent → generation; heads: rid →
    extents that a reserve found there already.
    """

    session: int
    reservations: dict[int, int] = field(default_factory=dict)
    leases: dict[int, Indices] = field(default_factory=dict)
    pins: dict[int, dict[int, int]] = field(default_factory=dict)
    heads: dict[int, tuple[Indices, NDArray[np.uint64]]] = field(default_factory=dict)
    pinned_bytes: int = 0
    pinned_count: int = 0
    settled: int = 0
    awaited: bool = False

    def remember_head(self, rid: int, indices: Indices, generations: NDArray[np.uint64]) -> None:
        """What request `rid` found there already, tail first: to be more recent than what it will commit."""
        if len(indices):
            self.heads[rid] = indices, generations
            if len(self.heads) > HEADS_PER_SESSION_MAX:
                del self.heads[next(iter(self.heads))]


class Rights:
    """The holdings of all sessions, and the counts per extent that follow from them."""

    def __init__(self, table: ExtentTable) -> None:
        self._table = table
        self.sessions: dict[int, Holdings] = {}
        self.leases: NDArray[np.int32] = np.zeros(table.capacity, np.int32)
        self._lease_ends: list[tuple[int, int, int]] = []
        self._leases_held = 0
        self.inherited: set[int] = set()

    def of(self, session: int) -> Holdings:
        """The holdings of a session, new if it had none."""
        holdings = self.sessions.get(session)
        if holdings is None:
            holdings = self.sessions[session] = Holdings(session)
        return holdings

    def held(self, index: int) -> bool:
        """Whether somebody has the right to read the extent now."""
        return bool(self.leases[index]) or bool(self._table.pins[index])

    # -- leases

    def lease(self, holdings: Holdings, rid: int, indices: Indices, ends_ns: int) -> None:
        """Grant a lease under the name `rid`."""
        holdings.leases[rid] = indices
        self.leases[indices] += 1  # an extent named twice counts once, here and when it ends
        self._leases_held += 1
        heapq.heappush(self._lease_ends, (ends_ns, holdings.session, rid))
        if len(self._lease_ends) > 2 * self._leases_held + _LEASE_ENDS_SPARE:
            self._lease_ends = [end for end in self._lease_ends if self._is_held(*end[1:])]
            heapq.heapify(self._lease_ends)

    def _is_held(self, session: int, rid: int) -> bool:
        return session in self.sessions and rid in self.sessions[session].leases

    def end_lease(self, holdings: Holdings, rid: int) -> None:
        """End a lease; one that has ended already is fine."""
        indices = holdings.leases.pop(rid, None)
        if indices is not None:
            self.leases[indices] -= 1
            self._leases_held -= 1

    def expire_leases(self, now_ns: int) -> None:
        """End the leases whose time is up."""
        while self._lease_ends and self._lease_ends[0][0] <= now_ns:
            _, session, rid = heapq.heappop(self._lease_ends)
            if session in self.sessions:
                self.end_lease(self.sessions[session], rid)

    # -- pins

    def pin(self, holdings: Holdings, rid: int, indices: Indices, generations: Any, nbytes: int) -> None:
        """Grant a pin under the name `rid`; `indices` are distinct."""
        holdings.pins[rid] = dict(zip(indices.tolist(), generations.tolist(), strict=True))
        holdings.pinned_bytes += nbytes
        holdings.pinned_count += len(indices)
        self._table.pins[indices] += np.uint64(1)

    def unpin(self, holdings: Holdings, rid: int, part: dict[int, int] | None) -> Indices:
        """End a pin, or the part of it; returns the extents that nobody pins any more. Whatever is not pinned
        is passed over.
        """
        held = holdings.pins.get(rid)
        if held is None:
            return _NONE
        if part is None:
            ended, held = list(held), {}
        else:
            ended = [index for index, gen in part.items() if held.get(index) == gen]
            for index in ended:
                del held[index]
        if not held:
            del holdings.pins[rid]
        return self._unpin(holdings, np.array(ended, np.intp))

    def _unpin(self, holdings: Holdings, indices: Indices) -> Indices:
        """Count distinct extents of an ended pin out; those that nobody pins any more."""
        holdings.pinned_bytes -= int(self._table.records["size"][indices].sum())
        holdings.pinned_count -= len(indices)
        if self.inherited:  # others may hold these who have not said so yet; counted anew when all have
            indices = indices[[index not in self.inherited for index in indices.tolist()]]
        assert self._table.pins[indices].all(), "an extent that nobody pins is unpinned"
        self._table.pins[indices] -= np.uint64(1)
        unpinned: Indices = indices[self._table.pins[indices] == 0]
        return unpinned

    def forget_extents(self, gone: Iterable[int]) -> None:
        """The extents exist no more (their segment has gone): end all pins and reservations of them."""
        lost = set(gone)
        for holdings in self.sessions.values():
            for index in lost & holdings.reservations.keys():
                del holdings.reservations[index]
            for rid in list(holdings.pins):
                gone_of = lost & holdings.pins[rid].keys()
                self._unpin(holdings, np.array(list(gone_of), np.intp))
                for index in gone_of:
                    del holdings.pins[rid][index]
                if not holdings.pins[rid]:
                    del holdings.pins[rid]
        for index in lost:
            self._table.pins[index] = 0
        self.inherited -= lost

    # -- reconciliation

    def surplus(
        self, holdings: Holdings, declared: Declare
    ) -> tuple[list[int], list[tuple[int, dict[int, int]]]]:
        """What the session was granted by requests up to `declared.settled` and does not name: (reservations,
        pins).
        """
        handles = unpack(declared.reservations, HANDLE)
        named = set(handles["index"][self.generations(handles["index"]) == handles["generation"]].tolist())
        reservations = [
            index
            for index, rid in holdings.reservations.items()
            if rid <= declared.settled and index not in named
        ]
        kept = {right.rid: _as_dict(right.handles) for right in declared.pins}
        pins = []
        for rid, held in holdings.pins.items():
            if rid <= declared.settled:
                lost = {index: gen for index, gen in held.items() if kept.get(rid, {}).get(index) != gen}
                if lost:
                    pins.append((rid, lost))
        return reservations, pins

    def adopt_pins(self, holdings: Holdings, declared: Declare) -> None:
        """After a restart: take up the pins that a session says it holds, which the table has counted
        already.
        """
        for right in declared.pins:
            held = {
                index: gen
                for index, gen in _as_dict(right.handles).items()
                if index in self.inherited and int(self.generations(np.array([index]))[0]) == gen
            }
            if held and right.rid not in holdings.pins:
                holdings.pins[right.rid] = held
                holdings.pinned_count += len(held)
                holdings.pinned_bytes += int(self._table.records["size"][list(held)].sum())

    def settle_inherited(self) -> Indices:
        """After a restart, when nobody is awaited any more: count the pins anew; returns the extents that
        have none.
        """
        counts = dict.fromkeys(self.inherited, 0)
        for holdings in self.sessions.values():
            for held in holdings.pins.values():
                for index in held.keys() & counts.keys():
                    counts[index] += 1
        for index, count in counts.items():
            self._table.pins[index] = count
        self.inherited.clear()
        return np.array([index for index, count in counts.items() if count == 0], np.intp)

    def generations(self, indices: Any) -> NDArray[np.uint64]:
        """Current generations; indices beyond the table have none (a value that no handle has)."""
        clipped = np.minimum(indices, self._table.capacity - 1)
        current: NDArray[np.uint64] = self._table.word[clipped] >> np.uint64(32)
        return np.where(clipped == indices, current, np.uint64(1 << 40))

    def check(self) -> None:
        """Prove that the counts per extent are the sums of what sessions hold."""
        leases = np.zeros_like(self.leases)
        pins: dict[int, int] = {}
        for holdings in self.sessions.values():
            for indices in holdings.leases.values():
                leases[indices] += 1
            for held in holdings.pins.values():
                for index in held:
                    pins[index] = pins.get(index, 0) + 1
            sizes = self._table.records["size"]
            counted = [index for held in holdings.pins.values() for index in held]
            assert holdings.pinned_bytes == sum(int(sizes[index]) for index in counted)
            assert holdings.pinned_count == len(counted)
        assert np.array_equal(leases, self.leases), "leases per extent do not add up"
        assert self._leases_held == sum(len(holdings.leases) for holdings in self.sessions.values())
        for index in self._table.in_use().tolist():
            if index not in self.inherited:
                assert int(self._table.pins[index]) == pins.get(index, 0), (
                    f"extent {index}: pins do not add up"
                )


def _as_dict(handles: bytes) -> dict[int, int]:
    packed = unpack(handles, HANDLE)
    return dict(zip(packed["index"].tolist(), packed["generation"].tolist(), strict=True))
