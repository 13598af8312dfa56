"""The directory: which chunk lies in which extent, who may write, read and evict it. No socket, thread or
clock.

`handle(session, rid, request, now_ns)` answers one request; a refused one raises `Refusal` and has changed
nothing. All state that must outlive the server is in the extent table; everything else here is rebuilt from
it (`metadata_server.recovery`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from metadata_server.chunks import NS as NS
from metadata_server.chunks import Policy as Policy
from metadata_server.chunks import keys_of
from metadata_server.errors import Refusal
from metadata_server.listing import Listing
from metadata_server.reading import Reading
from metadata_server.rights import Holdings
from metadata_server.writing import Writing
from vcache import limits, protocol
from vcache.protocol import ErrorCode
from vcache.table import ExtentTable, State


class Directory(Writing, Reading, Listing):
    """All chunks of one pool, and who may do what with them."""

    def __init__(self, table: ExtentTable, policy: Policy) -> None:
        super().__init__(table, policy)
        self._answers: dict[type[Any], Callable[[Holdings, int, Any, int], protocol.Reply]] = {
            protocol.Reserve: self._reserve,
            protocol.Commit: self._commit,
            protocol.Abort: self._abort,
            protocol.Lookup: self._lookup,
            protocol.Contains: self._contains,
            protocol.Acquire: self._acquire,
            protocol.Release: self._release,
            protocol.Offers: self._take_offers,
            protocol.Moved: self._moved,
            protocol.Touch: self._touch,
            protocol.Remove: self._remove,
            protocol.Clear: self._clear,
            protocol.List: self._list,
            protocol.Describe: self._describe,
            protocol.Declare: self._declare,
            protocol.Check: self._check,
        }

    def handle(self, session: int, rid: int, request: protocol.Request, now_ns: int) -> protocol.Reply:
        """Answer one request. Raises Refusal (nothing has changed), RemoteProtocolError.

        Call `catch_up` when the answer is on its way: what only later requests can see is done there.
        """
        self.tick(now_ns)
        return self._answers[type(request)](self.rights.of(session), rid, request, now_ns)

    def tick(self, now_ns: int) -> None:
        """End leases and chunks whose time is up."""
        self.catch_up()
        self.rights.expire_leases(now_ns)
        self._look_at_offers(now_ns)
        while self._expiries and self._expiries[0][0] <= now_ns:
            _, index, generation = heapq.heappop(self._expiries)
            if self._is(index, generation, State.COMMITTED):
                self.counters["expired"] += 1
                self._forget(index)

    # -- sessions and segments

    def end_session(self, session: int) -> None:
        """The session is dead: everything it held is free. Its segments are the caller's to drop."""
        self.catch_up()
        self._no_copier(session)
        holdings = self.rights.sessions.get(session)
        if holdings is None:
            return
        for rid in list(holdings.leases):
            self.rights.end_lease(holdings, rid)
        for rid in list(holdings.pins):
            self._unpinned(self.rights.unpin(holdings, rid, None))
        for index in list(holdings.reservations):
            self._give_up(holdings, index)
        del self.rights.sessions[session]
        self._settle_if_all_are_here()

    def await_sessions(self, alive: Iterable[int]) -> None:
        """After a restart: these sessions live and have not declared yet; all others that the table knows are
        dead.
        """
        living = set(alive)
        for session in living:
            self.rights.of(session).awaited = True
        for session in set(self.rights.sessions) - living:
            self.end_session(session)
        self._settle_if_all_are_here()

    def _declare(self, mine: Holdings, rid: int, ask: protocol.Declare, now_ns: int) -> protocol.Reply:
        if len(ask.pins) > limits.RIGHTS_PER_SESSION_MAX:
            wanted = f"wanted at most {limits.RIGHTS_PER_SESSION_MAX}"
            raise Refusal(ErrorCode.LIMIT, f"declare: got {len(ask.pins)} pins, {wanted}")
        if mine.awaited:
            self.rights.adopt_pins(mine, ask)
        reservations, pins = self.rights.surplus(mine, ask)
        for index in reservations:
            self._give_up(mine, index)
        for right, lost in pins:
            self._unpinned(self.rights.unpin(mine, right, lost))
        mine.settled = max(mine.settled, ask.settled)
        freed = len(reservations) + sum(len(lost) for _, lost in pins)
        self.counters["reclaimed"] += freed
        if mine.awaited:
            mine.awaited = False
            self._settle_if_all_are_here()
        return protocol.Done(freed)

    def _settle_if_all_are_here(self) -> None:
        if self.rights.inherited and not any(holdings.awaited for holdings in self.rights.sessions.values()):
            self._unpinned(self.rights.settle_inherited())

    def add_segment(self, session: int, attach: protocol.Attach) -> int:
        """Lend a segment to the pool, or recognise one that the table knows; returns its number."""
        known = self.find_segment(attach.segment_id, attach.incarnation)
        if known is not None:
            if int(self.table.segments["session"][known]) != session:
                raise Refusal(ErrorCode.FOREIGN, "attach: another session lends this segment")
            return int(self.table.segments["word"][known]) >> 32
        slot = next(
            (slot for slot in range(limits.SEGMENTS_MAX) if not self.table.segment_in_use(slot)), None
        )
        if slot is None:
            raise Refusal(
                ErrorCode.LIMIT, f"segments: {limits.SEGMENTS_MAX} are there already, no more fit the table"
            )
        number = self.table.next_segment()
        self.table.write_segment(
            slot,
            number,
            segment_id=attach.segment_id,
            incarnation=attach.incarnation,
            size=attach.size,
            data_offset=attach.data_offset,
            session=session,
            rank=attach.rank,
            device=attach.device,
            numa=attach.numa,
        )
        self.allocator.add_segment(number, attach.data_offset, attach.size, attach.rank, session, attach.numa)
        return number

    def find_segment(self, segment_id: bytes, incarnation: int) -> int | None:
        """The slot of a segment that is in the table."""
        for slot in range(limits.SEGMENTS_MAX):
            record = self.table.segments[slot]
            same = record["incarnation"] == incarnation and bytes(record["segment_id"]) == segment_id
            if same and self.table.segment_in_use(slot):
                return slot
        return None

    def drop_segment(self, number: int) -> None:
        """End a segment's incarnation: its chunks are gone, nobody is granted its extents any more."""
        self.catch_up()
        for slot in range(limits.SEGMENTS_MAX):
            if self.table.segment_in_use(slot) == number:
                self.table.drop_segment(slot)
        inside = np.flatnonzero(self.table.segment[: self._records_used()] == number)
        lost = [index for index in inside.tolist() if self.allocator.in_slab(index)]
        for index in lost:
            if self.table.state(index) is State.COMMITTED:
                self._unbind(index)
        self.rights.forget_extents(lost)
        self.allocator.drop_segment(number)

    # -- all at once

    def _remove(self, mine: Holdings, rid: int, ask: protocol.Remove, now_ns: int) -> protocol.Reply:
        doomed = [key for key in keys_of(ask.keys) if key in self.chunks]
        return self._forget_all(doomed)

    def _clear(self, mine: Holdings, rid: int, ask: protocol.Clear, now_ns: int) -> protocol.Reply:
        if ask.namespace and len(ask.namespace) != limits.NAMESPACE_BYTES:
            raise Refusal(ErrorCode.ARGUMENT, f"clear: namespace of {len(ask.namespace)} bytes")
        spaces = self.table.records["namespace"]
        return self._forget_all(
            [
                key
                for key, at in self.chunks.items()
                if not ask.namespace or bytes(spaces[at]) == ask.namespace
            ]
        )

    def _check(self, mine: Holdings, rid: int, ask: protocol.Check, now_ns: int) -> protocol.Reply:
        self.check()
        return protocol.Done()

    def check(self) -> None:
        """Prove that extents never overlap, that nothing leaks and that the table says what we believe."""
        self.catch_up()
        self.allocator.check()
        self.rights.check()
        free = {index for slab in self.allocator.slabs.values() for index in slab.free}
        bound = [index for key in self.chunks for index in self._replicas_of(key)]
        assert len(bound) == len(set(bound)), "an extent is bound twice"
        assert set(self.replicas) <= set(self.chunks)
        reserved = {
            index: (each.session, rid)
            for each in self.rights.sessions.values()
            for index, rid in each.reservations.items()
        }
        assert len(reserved) == sum(len(each.reservations) for each in self.rights.sessions.values()), (
            "an extent is reserved twice"
        )
        for index, owner in reserved.items():
            record = self.table.records[index]
            assert (record["session"], record["rid"]) == owner, f"extent {index} is another reservation"
            assert self.table.state(index) is State.RESERVED and self.allocator.in_slab(index)
        for slab in self.allocator.slabs.values():
            for index in slab.indices:
                state = self.table.state(index)
                assert (state is State.FREE) == (index in free), (
                    f"extent {index} is {state.name}, free={index in free}"
                )
                assert (state is State.RESERVED) == (index in reserved), f"extent {index} is {state.name}"
                pinned = bool(self.table.pins[index])
                assert state is not State.ORPHANED or pinned, f"extent {index} is orphaned and nobody pins it"
        for key in self.chunks:
            for index in self._replicas_of(key):
                assert self.table.state(index) is State.COMMITTED and self.table.key(index) == key
        assert sum(map(len, self._orders.values())) == len(bound), "the eviction order and the chunks differ"
        committed = sum(
            self.table.state(i) is State.COMMITTED for s in self.allocator.slabs.values() for i in s.indices
        )
        assert committed == len(bound), "a committed extent is not findable"
