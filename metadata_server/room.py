"""Room for new chunks: what is given up for them, coldest first, and never what somebody holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from metadata_server.allocator import Slab
from metadata_server.saving import Saving
from vcache.table import State


class Room(Saving):
    """Allocation with eviction."""

    def _allocate(
        self, count: int, size: int, near: int, keep: set[int], now_ns: int, *, patient: bool = False
    ) -> tuple[list[int], int]:
        """Up to `count` extents, FREE in the table; room is made by giving up what is coldest.

        In a rank at a time if chunks move between ranks, else first what is free in any. patient: nothing,
        and how many are coming, where chunks are being copied that have to go.
        """
        ranks = self.allocator.ranks()
        patient = patient and (bool(self._savers) or self._is_demoting())
        taken = [] if self._is_demoting() else self.allocator.take(count, size, near)
        for rank in ranks:
            if len(taken) == count:
                break
            more, coming = self._allocate_in(rank, count - len(taken), size, near, keep, now_ns, patient)
            taken += more
            if coming:
                for index in taken:
                    self.allocator.give_back(index)
                return [], coming
        if ranks:
            self._look_ahead(ranks[0], count, size, now_ns)
        return taken, 0

    def _allocate_in(
        self, rank: int, count: int, size: int, near: int, keep: set[int], now_ns: int, patient: bool
    ) -> tuple[list[int], int]:
        """As `_allocate`, in the segments of one rank; what is there is taken also where more is coming."""
        taken = self.allocator.take(count, size, near, rank)
        while len(taken) < count:
            missing = count - len(taken)
            went, coming = self._let_go(missing, rank, size, keep, now_ns) if patient else (False, 0)
            if not went and coming:
                return taken, coming
            if not went and not self._make_room(missing, rank, size, keep):
                break
            more = self.allocator.take(missing, size, near, rank)
            if not more:
                break
            taken += more
        return taken, 0

    def _let_go(self, count: int, rank: int, size: int, keep: set[int], now_ns: int) -> tuple[bool, int]:
        """Evict those of the coldest chunks that may go; the others are offered. Whether any went, and how
        many chunks are on their way elsewhere.
        """
        slabs = self._colder_slabs(count, rank, size, self._coldest_ns(rank, size), keep)
        if slabs:
            inside = [index for slab in slabs for index in slab.indices]
            staying = [index for index in inside if not self._may_be_emptied(index)]
            if not staying:
                self._empty_all(slabs)
                return True, 0
            for index in staying:
                self._offer(index, now_ns)
            return False, sum(index in self._offers for index in staying)
        order = self._order(rank, size)
        missing = count - self._coming(rank, size)
        ready = self._offer_coldest(order, missing, keep, now_ns) if missing > 0 else []
        order.give_up(ready)
        self._evicted(ready)
        return bool(ready), self._coming(rank, size)

    def _may_be_emptied(self, index: int) -> bool:
        return self.table.state(index) is not State.COMMITTED or self._may_go(index)

    def _coldest_ns(self, rank: int, size: int) -> int | None:
        """When what is coldest of this size was used last; None: there is none."""
        coldest = self._order(rank, size).coldest()
        return None if coldest is None else int(self.table.used_ns[coldest])

    def _make_room(self, count: int, rank: int, size: int, keep: set[int]) -> bool:
        """Evict up to `count` extents of this size, or empty slabs of other sizes that are colder; False if
        neither can be.
        """
        limit_ns = self._coldest_ns(rank, size)
        slabs = self._colder_slabs(count, rank, size, limit_ns, keep)
        if slabs:
            self._empty_all(slabs)
            return True
        victims = self._order(rank, size).evict(count, lambda index: index in keep or self.rights.held(index))
        self._evicted(victims)
        if not victims and limit_ns is not None:
            slabs = self._colder_slabs(count, rank, size, None, keep)
            self._empty_all(slabs)
            return bool(slabs)
        return bool(victims)

    def _empty_all(self, slabs: list[Slab]) -> None:
        for slab in slabs:
            self._empty(slab)
        sizes = self.allocator.sizes()
        for which in [
            which for which, order in self._orders.items() if not len(order) and which[1] not in sizes
        ]:
            del self._orders[which]

    def _colder_slabs(
        self, count: int, rank: int, size: int, limit_ns: int | None, keep: set[int]
    ) -> list[Slab]:
        """Slabs of other sizes to empty for this size: colder than `limit_ns`, or as cold as there are."""
        if self.allocator.sizes() <= {size}:
            return []
        held = {
            slab: self._held_in(slab, keep)
            for slab in self.allocator.slabs.values()
            if slab.size != size
            and self.allocator.rooms[slab.segment].rank == rank
            and (limit_ns is None or self._coldness(slab) < limit_ns)
        }

        def may_empty(slab: Slab) -> bool:
            return slab in held and not held[slab].any()

        if not held:
            return []
        if limit_ns is not None:  # as long as there are others, slabs stay whole
            found = self.allocator.windows(count, size, may_empty, self._coldness, rank)
            if found:
                return found
        for slab, flags in list(held.items()):
            if flags.any() and not flags.all():
                held.update({part: self._held_in(part, keep) for part in self._split(slab, flags)})
        return self.allocator.windows(count, size, may_empty, self._coldness, rank)

    def _split(self, slab: Slab, held: NDArray[np.bool_]) -> list[Slab]:
        """Part what is held from what may be evicted: a few pins or stocks must not keep whole slabs."""
        parts = self.allocator.split(slab, held.tolist())
        used_ns = self._slab_used_ns.pop(slab.number, 0)
        for part in parts:
            self._slab_of[part.indices] = part.number
            self._slab_used_ns[part.number] = min(used_ns, int(self.table.used_ns[part.indices].max()))
        return parts

    def _coldness(self, slab: Slab) -> int:
        return 0 if slab.spare else self._slab_used_ns.get(slab.number, 0)

    def _held_in(self, slab: Slab, keep: set[int]) -> NDArray[np.bool_]:
        """Of each extent, whether it must stay: somebody may write or read it, or it is in `keep`."""
        indices = slab.indices
        states = self.table.word[indices] >> np.uint64(28) & np.uint64(0xF)
        held: NDArray[np.bool_] = (states == State.RESERVED) | (states == State.ORPHANED)
        held |= self.table.pins[indices] > 0
        held |= self.rights.leases[indices] > 0
        if not keep.isdisjoint(indices):
            held |= np.isin(indices, list(keep))
        return held

    def _empty(self, slab: Slab) -> None:
        for index in slab.indices:
            if self.table.state(index) is State.COMMITTED:
                self._count_evicted(index)
                self._forget(index)
        if slab.number in self.allocator.slabs:
            self._slab_used_ns.pop(slab.number, None)
            self.allocator.dissolve(slab)

    def _evicted(self, victims: list[int]) -> None:
        for index in victims:
            self._count_evicted(index)
            self._unbind(index, in_order=False)
            self.table.free(index)
            self.allocator.give_back(index)

    def _count_evicted(self, index: int) -> None:
        self.counters["evicted"] += 1
        self.counters["evicted_unsaved"] += self._is_lost(index)
