"""Copies that a process makes for the directory: to another segment, or to lower tiers."""

from __future__ import annotations

import numpy as np

from metadata_server.chunks import NS
from metadata_server.errors import Refusal
from metadata_server.rights import Holdings
from metadata_server.room import Room
from metadata_server.saving import BELOW, Copy, Offer
from vcache import limits, protocol
from vcache.protocol import HANDLE, ErrorCode
from vcache.table import State


class Moving(Room):
    """The requests of those who copy."""

    def _take_offers(self, mine: Holdings, rid: int, ask: protocol.Offers, now_ns: int) -> protocol.Reply:
        if rid in mine.pins or len(mine.leases) + len(mine.pins) >= limits.RIGHTS_PER_SESSION_MAX:
            raise Refusal(ErrorCode.LIMIT, "offers: too many rights, or a request that was granted already")
        known = self._savers if ask.below else self._movers
        if ask.limit <= 0:
            known.pop(mine.session, None)
        else:
            known[mine.session] = now_ns
            self._was_saving |= ask.below
        sources: list[int] = []
        targets: list[int] = []
        full: set[tuple[int, int]] = set()
        for index, offer in list(self._offers.items()):
            if len(sources) >= min(ask.limit, limits.OFFERS_PER_REQUEST_MAX):
                break
            if not self._is(index, offer.generation, State.COMMITTED):
                del self._offers[index]
            elif self._whose(index, offer) == (0 if ask.below else mine.session):
                keep = {index, *sources}  # not pinned yet: that is for all of them at once
                target = None if ask.below else self._target(index, offer, keep, full, now_ns)
                if ask.below or target is not None:
                    del self._offers[index]
                    self._copies[index] = Copy(mine.session, rid, now_ns, offer.up)
                    sources.append(index)
                    targets += [] if target is None else [target]
                    if target is not None:  # at once: the next target must not be the same extent
                        self._reserve_for(mine, rid, target, index)
        return self._give_out(mine, rid, sources, targets, now_ns)

    def _whose(self, index: int, offer: Offer) -> int:
        """The session that is to copy it; 0: whoever writes to lower tiers."""
        if not offer.up:
            return self._demoter(index)
        room = self.allocator.rooms.get(offer.up)
        return 0 if room is None else room.session

    def _target(
        self, index: int, offer: Offer, keep: set[int], full: set[tuple[int, int]], now_ns: int
    ) -> int | None:
        """A free extent to copy to; None: there is none now, and the offer waits, or it is given up.

        keep: what no room may be made of. full: ranks and sizes where others wait already: to look for room
        once tells for all.
        """
        rank = self.allocator.rank_of(index)
        size = self.allocator.slab_of(index).size
        ranks = self.allocator.ranks()
        to = ranks[0] if offer.up else ranks[ranks.index(rank) + 1]
        if (to, size) in full:
            return None
        near = offer.up or self.allocator.nearest(index, to)
        taken, coming = self._allocate_in(to, 1, size, near, keep, now_ns, patient=True)
        if not offer.up:
            self._look_ahead(to, 1, size, now_ns)
        if taken:
            return taken[0]
        if coming:
            self._waiting.add(self._whose(index, offer))
            full.add((to, size))
            return None
        del self._offers[index]  # all there is held
        if not offer.up:
            self._not_copied(index)
        return None

    def _reserve_for(self, mine: Holdings, rid: int, target: int, source: int) -> None:
        self.table.reserve(target, mine.session, rid, bytes(self.table.records["layout"][source]))
        mine.reservations[target] = rid
        self._layout_of[target] = self._layout_of[source]

    def _give_out(
        self, mine: Holdings, rid: int, sources: list[int], targets: list[int], now_ns: int
    ) -> protocol.Offered:
        indices = np.array(sources, np.intp)
        if sources:
            records = self.table.records[indices]
            nbytes = int(records["size"].sum())
            self.rights.pin(mine, rid, indices, self.rights.generations(indices), nbytes)
        expiries = [int(self.table.records["expiry_s"][index]) * NS for index in sources]
        left = [max((expiry - now_ns) // 1_000_000, 1) if expiry else 0 for expiry in expiries]
        self.counters["copies_given_out"] += len(sources)
        return protocol.Offered(
            self._pack(indices, "length"),
            self._pack(np.array(targets, np.intp), "size"),
            b"".join(map(self.table.key, sources)),
            b"".join(bytes(self.table.records["layout"][index]) for index in sources),
            np.array(left, "<i8").tobytes(),
        )

    def _moved(self, mine: Holdings, rid: int, ask: protocol.Moved, now_ns: int) -> protocol.Reply:
        source = protocol.unpack(ask.source, HANDLE).tolist()
        target = protocol.unpack(ask.target, HANDLE).tolist()
        if len(source) != 1 or len(target) > 1:
            raise Refusal(ErrorCode.ARGUMENT, "moved: wanted one source and at most one target")
        index, generation = source[0]
        is_held = mine.pins.get(ask.right, {}).get(index) == generation
        is_there = is_held and self._is(index, generation, State.COMMITTED)
        copied = ask.done and is_there
        for place, its_generation in target:
            if place in mine.reservations and self.table.generation(place) == its_generation:
                copied = copied and self._bind_copy(mine, index, place)
                if place in mine.reservations:
                    self._give_up(mine, place)
            else:
                copied = False
        copy = self._copies.pop(index, None) if is_held else None
        if copied and not target:
            self._marks[index] |= BELOW
        elif is_there and not copied and not (copy is not None and copy.up):
            self._not_copied(index)
        self._unpinned(self.rights.unpin(mine, ask.right, {index: generation}))
        self.called |= self._waiting  # what was copied may go now
        self._waiting.clear()
        self.counters["copies_done"] += copied
        return protocol.Done(int(copied))

    def _bind_copy(self, mine: Holdings, source: int, target: int) -> bool:
        """Make a copy the chunk's replica, with all that its source's record says; whether it is one now."""
        key, record = self.table.key(source), self.table.records[source]
        if not self._elsewhere(key, target) or int(self.table.records["size"][target]) < int(
            record["length"]
        ):
            return False
        del mine.reservations[target]
        used_ns, expiry_s = int(record["used_ns"]), int(record["expiry_s"])
        namespace = bytes(record["namespace"])
        self.table.commit(target, key, int(record["length"]), namespace, expiry_s, used_ns)
        self.adopt_chunk(target, key, used_ns, expiry_s * NS)
        self._marks[target] = self._marks[source] & BELOW
        self.prepare_grants([target])
        return True
