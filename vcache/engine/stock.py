"""Extents that an allocator can hand out at once: reserved before anybody knows for which key."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack

from torch import Tensor

from vcache.client import Reservation
from vcache.engine.pool import Pool
from vcache.errors import LocalStateError
from vcache.limits import STOCK_BYTES_MAX, STOCK_REFILL_EXTENTS
from vcache.protocol import Extents


class Blank:
    """One reserved extent within reach: ours to write until it is committed or given back.

    chunk: its bytes (uint8, 1-D), as many as were asked for.
    """

    __slots__ = ("borrow", "chunk", "extents", "lineage", "size")

    def __init__(self, extents: Extents, lineage: int, size: int, chunk: Tensor, borrow: ExitStack) -> None:
        self.extents = extents
        self.lineage = lineage
        self.size = size
        self.chunk = chunk
        self.borrow = borrow

    def let_go(self) -> None:
        """End access to the memory."""
        del self.chunk
        self.borrow.close()


class Stock:
    """Blank extents by size. Thread-safe; raises only EngineClosed and ForkedProcess.

    synchronise: waits for what was launched into extents; called before any goes back to the server.
    """

    def __init__(self, pool: Pool, synchronise: Callable[[], None]) -> None:
        self._pool = pool
        self._synchronise = synchronise
        self._guard = threading.Lock()
        self._waiting: dict[int, list[tuple[Extents, int]]] = {}
        self._waiting_bytes = 0
        self._size_before = 0

    @property
    def extents(self) -> int:
        """How many wait."""
        with self._guard:
            return sum(map(len, self._waiting.values()))

    def take(self, count: int, size: int) -> list[Blank]:
        """`count` blanks of `size` bytes; fewer if the pool has no room."""
        taken: list[Blank] = []
        lost = 0
        while len(taken) < count and lost <= STOCK_REFILL_EXTENTS:
            place = self._waiting_of(size)
            if place is None:
                if not self._refill(count - len(taken), size):
                    break
                continue
            blank = self._within_reach(*place, size)
            if blank is None:
                lost += 1
            else:
                taken.append(blank)
        return taken

    def give_back(self, blank: Blank) -> None:
        """Nobody here writes to it any more: it waits for the next one, or goes back to the server."""
        blank.let_go()
        with self._guard:
            if self._waiting_bytes + blank.size <= STOCK_BYTES_MAX:
                self._waiting_bytes += blank.size
                self._waiting.setdefault(blank.size, []).append((blank.extents, blank.lineage))
                return
        self._abort(blank.extents)

    def drain(self) -> int:
        """Give all that waits back to the server; how many."""
        with self._guard:
            places = [place for waiting in self._waiting.values() for place in waiting]
            self._waiting.clear()
            self._waiting_bytes = 0
        for extents, _ in places:
            self._abort(extents)
        return len(places)

    def _waiting_of(self, size: int) -> tuple[Extents, int] | None:
        with self._guard:
            waiting = self._waiting.get(size)
            if not waiting:
                return None
            self._waiting_bytes -= size
            return waiting.pop()

    def _refill(self, count: int, size: int) -> bool:
        """Ask for `count`, and some more of a size that is asked for again and again; whether any came."""
        usual, self._size_before = size == self._size_before, size
        full = min(STOCK_REFILL_EXTENTS, (STOCK_BYTES_MAX - self._waiting_bytes) // size) if usual else 0
        reservation = self._pool.reserve_blank(count, size, max(full - count, 0))
        if reservation is not None and not len(reservation.extents) and self.drain():
            reservation = self._pool.reserve_blank(count, size)
        if reservation is None or not len(reservation.extents):
            return False
        self._put(reservation, size)
        return True

    def _put(self, reservation: Reservation, size: int) -> None:
        places = [
            (reservation.extents[at : at + 1], reservation.lineage) for at in range(len(reservation.extents))
        ]
        with self._guard:
            self._waiting_bytes += size * len(places)
            self._waiting.setdefault(size, []).extend(reversed(places))

    def _within_reach(self, extents: Extents, lineage: int, size: int) -> Blank | None:
        borrow = ExitStack()
        views = borrow.enter_context(self._pool.borrowed(extents, [size], lineage))
        chunk = views[0]
        views.clear()
        if chunk is None:  # its holder has gone, or the server began anew: the extent is nobody's
            borrow.close()
            self._abort(extents)
            return None
        return Blank(extents, lineage, size, chunk, borrow)

    def _abort(self, extents: Extents) -> None:
        self._synchronise()
        try:
            self._pool.abort(extents)
        except LocalStateError:
            return  # the session has ended, and its reservations with it
