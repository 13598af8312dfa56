"""What is copied before it is evicted: which chunks, by whom, and how long anybody waits for it.

A chunk that is to be evicted soon is **offered**: to the holder of its segment, which copies it to a segment
of a higher rank (demotion), or, where there is none, to the engines that write to lower tiers (write-back).
What was used in a high rank is offered to a holder of the lowest one (promotion). Whoever takes an offer has
its source pinned and its target reserved: a death, a lost answer or a restart ends it as it ends any right.
Nothing of it is in the table: what a restarted server does not remember is offered again.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, NamedTuple

import numpy as np

from metadata_server.chunks import NS, Chunks, Policy
from metadata_server.eviction import EvictionPolicy
from metadata_server.rights import Indices
from vcache import limits
from vcache.table import ExtentTable, State

BELOW: Final = 1
"""A lower tier has it."""
GIVEN_UP: Final = 2
"""No lower tier took it in time."""
STAYS: Final = 4
"""It was not copied to a higher rank in time."""

_LOOK_NS: Final = NS // 10
_OFFER_NS: Final = int(limits.OFFER_S * NS)


class Offer(NamedTuple):
    """A chunk that waits for somebody to copy it. up: the segment to promote it to; 0: it goes down."""

    generation: int
    since_ns: int
    up: int


class Copy(NamedTuple):
    """An offer that was taken, by the request `rid` of a session."""

    session: int
    rid: int
    since_ns: int
    up: int


class Saving(Chunks):
    """Offers, and what is known of who keeps what. `called`: sessions to be told that there are offers."""

    def __init__(self, table: ExtentTable, policy: Policy) -> None:
        super().__init__(table, policy)
        self.called: set[int] = set()
        self._offers: dict[int, Offer] = {}
        self._copies: dict[int, Copy] = {}
        # When each asked for offers last.
        self._movers: dict[int, int] = {}
        self._savers: dict[int, int] = {}
        self._was_saving = False
        self._waiting: set[int] = set()
        self._marks = np.zeros(table.capacity, np.uint8)
        self._looked_ns = 0

    def adopt_chunk(self, index: int, key: bytes, used_ns: int, expiry_ns: int) -> None:
        """As in `Chunks`; nobody has copied it yet."""
        super().adopt_chunk(index, key, used_ns, expiry_ns)
        self._marks[index] = 0

    # -- who keeps what

    def _demoter(self, index: int) -> int:
        """The session that can copy this chunk to a higher rank, the one that lends its segment; 0: none."""
        if not self._movers or self._marks[index] & STAYS:
            return 0
        room = self.allocator.rooms[self.allocator.slab_of(index).segment]
        return room.session if room.session in self._movers and room.rank < self.allocator.ranks()[-1] else 0

    def _may_go(self, index: int) -> bool:
        """Whether somebody keeps the chunk when it is evicted now, or nobody could."""
        if self.table.key(index) in self.replicas:
            return True
        if self._demoter(index):
            return False
        return not self._savers or bool(self._marks[index] & (BELOW | GIVEN_UP))

    def _is_lost(self, index: int) -> bool:
        """Whether its eviction loses what somebody was to keep."""
        if self.table.key(index) in self.replicas or self._marks[index] & BELOW:
            return False
        return self._was_saving or bool(self._marks[index] & STAYS) or bool(self._demoter(index))

    def _is_demoting(self) -> bool:
        return bool(self._movers) and len(self.allocator.ranks()) > 1

    # -- offers

    def _offer(self, index: int, now_ns: int) -> None:
        """Have a chunk copied that may not go yet. Beyond OFFERS_MAX it is not: then it goes as it is."""
        if self._is_full() or index in self._offers or index in self._copies:
            return
        self._offers[index] = Offer(self.table.generation(index), now_ns, 0)
        demoter = self._demoter(index)
        self.called.update([demoter] if demoter else self._savers)

    def _offer_up(self, indices: Indices, near: int, now_ns: int) -> None:
        """Chunks are used: have those in high ranks copied to the segment `near`, or the roomiest one."""
        if not self._is_demoting():
            return
        lowest = self.allocator.ranks()[0]
        rank_of = self.allocator.rank_of
        deep = [index for index in indices.tolist() if rank_of(index) > lowest]
        # Who is near a high rank is given that also where the chunk is up already.
        deep = [index for index in deep if rank_of(self.chunks[self.table.key(index)]) > lowest]
        rooms = [each for each in self.allocator.rooms.values() if each.rank == lowest]
        rooms = [each for each in rooms if each.session in self._movers]
        if not deep or not rooms:
            return
        target = max(rooms, key=lambda room: (room.segment == near, room.free_bytes))
        for index in deep[: limits.OFFERS_PER_REQUEST_MAX]:
            if not self._is_full() and index not in self._copies:
                # One that was about to go down is in use again.
                self._offers[index] = Offer(self.table.generation(index), now_ns, target.segment)
                self.called.add(target.session)

    def _is_full(self) -> bool:
        return len(self._offers) + len(self._copies) >= limits.OFFERS_MAX

    def _coming(self, rank: int, size: int) -> int:
        """How many extents of this size will be free to go when they were copied, before long."""
        waiting = [index for index, offer in self._offers.items() if not offer.up]
        late_ns = self._looked_ns - _OFFER_NS
        waiting += [index for index, copy in self._copies.items() if not copy.up and copy.since_ns > late_ns]
        return sum(
            self.allocator.in_slab(index)
            and self.allocator.slab_of(index).size == size
            and self.allocator.rank_of(index) == rank
            for index in waiting
        )

    def _offer_coldest(self, order: EvictionPolicy, count: int, keep: set[int], now_ns: int) -> list[int]:
        """Of the `count` chunks that would be evicted next: those that may go; the others are offered."""
        coldest = order.peek(count, lambda index: index in keep or self.rights.held(index))
        ready: list[int] = []
        going: Counter[bytes] = Counter()
        for index in coldest:
            key = self.table.key(index)
            others = self.replicas.get(key)
            if self._may_go(index) and (others is None or going[key] < len(others)):
                ready.append(index)
                going[key] += 1
            elif others is None:
                self._offer(index, now_ns)
        return ready

    def _look_ahead(self, rank: int, count: int, size: int, now_ns: int) -> None:
        """Have the coldest chunks of a rank that is nearly full copied before somebody needs their room."""
        if not self._savers and not self._is_demoting():
            return
        rooms = [room for room in self.allocator.rooms.values() if room.rank == rank]
        whole = sum(room.end - room.begin for room in rooms) // size
        wanted = min(max(count, whole // limits.OFFER_AHEAD_SHARE), limits.OFFER_AHEAD_MAX)
        missing = wanted - sum(room.free_bytes for room in rooms) // size - self._coming(rank, size)
        if missing > 0:
            self._offer_coldest(self._order(rank, size), missing, set(), now_ns)

    # -- time and death

    def _look_at_offers(self, now_ns: int) -> None:
        """Give up what waits for too long, and forget copies whose right has ended."""
        if now_ns - self._looked_ns < _LOOK_NS:
            return
        self._looked_ns = now_ns
        late_movers: set[int] = set()
        late_savers: set[int] = set()
        for index, offer in list(self._offers.items()):
            if not self._is(index, offer.generation, State.COMMITTED):
                del self._offers[index]
            elif now_ns - offer.since_ns > _OFFER_NS:
                del self._offers[index]
                if not offer.up:
                    demoter = self._demoter(index)
                    late_movers |= {demoter} if demoter else set()
                    late_savers |= set() if demoter else set(self._savers)
                    self._not_copied(index)
        self._set_aside(self._movers, late_movers, now_ns)
        self._set_aside(self._savers, late_savers, now_ns)
        for index, copy in list(self._copies.items()):
            holdings = self.rights.sessions.get(copy.session)
            if holdings is None or index not in holdings.pins.get(copy.rid, ()):
                del self._copies[index]

    def _not_copied(self, index: int) -> None:
        self._marks[index] |= STAYS if self._demoter(index) else GIVEN_UP

    def _set_aside(self, known: dict[int, int], late: set[int], now_ns: int) -> None:
        """Those who are stopped, or hang in a copy: nobody waits for them until they ask again."""
        for session in late:
            if now_ns - known[session] > _OFFER_NS:
                del known[session]
                self.called.add(session)

    def _no_copier(self, session: int) -> None:
        """The session copies nothing any more."""
        self._movers.pop(session, None)
        self._savers.pop(session, None)
        self._waiting.discard(session)
        for index in [index for index, copy in self._copies.items() if copy.session == session]:
            del self._copies[index]
