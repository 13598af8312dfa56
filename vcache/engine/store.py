"""Paged KV → pool: reserve, gather in place, commit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vcache.client import Reservation
from vcache.engine.arguments import Transfer
from vcache.engine.copies import Copies
from vcache.engine.pool import Pool
from vcache.engine.stats import Cause, Counters
from vcache.engine.tier_queue import TierQueues
from vcache.limits import KEYS_PER_REQUEST_MAX
from vcache.protocol import Outcome


class Store:
    """Stores transfers. Thread-safe.

    queue: by which chunks go on to lower tiers at once; None: they do not.
    """

    def __init__(self, pool: Pool, copies: Copies, queue: TierQueues | None, counters: Counters) -> None:
        self._pool = pool
        self._copies = copies
        self._queue = queue
        self._counters = counters

    def run(self, transfer: Transfer) -> int:
        """Copy the chunks that the pool lacks into it, commit them, and return how many of all it has now.

        When it returns, or raises, nothing touches the pages or the extents any more.
        """
        self._counters.add(store_calls=1)
        with self._counters.seconds("store_seconds"):
            there = 0
            for begin in range(0, len(transfer), KEYS_PER_REQUEST_MAX):
                there += self._store(transfer.part(begin, begin + KEYS_PER_REQUEST_MAX))
        self._counters.add(unstored_chunks=len(transfer) - there)
        return there

    def _store(self, transfer: Transfer) -> int:
        reservation = self._pool.reserve(transfer.keys)
        if reservation is None:
            return 0
        present = sum(reservation.present)
        self._counters.add(present_chunks=present)
        if not len(reservation.extents):
            return present
        missing = [at for at, there in enumerate(reservation.present) if not there]
        transfer = transfer.pick(missing[: len(reservation.extents)])
        written = self._gather(transfer, reservation)
        return present + self._commit(transfer.pick(written), reservation, written)

    def _gather(self, transfer: Transfer, reservation: Reservation) -> list[int]:
        """Fill the extents that are within reach and give the others back; the positions of those filled."""
        extents = reservation.extents
        try:
            with self._pool.borrowed(
                extents, transfer.sizes, reservation.lineage, transfer.paged.device.type
            ) as views:
                written = [at for at, view in enumerate(views) if view is not None]
                if written:
                    self._copies.gather(transfer.pick(written), [view for view in views if view is not None])
        except BaseException:
            self._pool.abort(extents)  # the copy is over, however it ended
            raise
        if len(written) < len(extents):
            self._pool.abort(np.delete(extents, written))
        return written

    def _commit(self, transfer: Transfer, reservation: Reservation, written: Sequence[int]) -> int:
        """Commit what was written; how many of it the pool has now."""
        if not written:
            return 0
        extents = reservation.extents[list(written)]
        outcomes = self._pool.commit(extents, transfer.keys, transfer.sizes, reservation.lineage)
        stored = [at for at, outcome in enumerate(outcomes) if outcome == Outcome.COMMITTED]
        lost = outcomes.count(Outcome.LOST)
        stale = len(outcomes) - len(stored) - lost
        if stale:
            self._counters.failed(Cause.STALE, "reservations had ended before their commit", chunks=stale)
        sizes = [transfer.sizes[at] for at in stored]
        self._counters.add(
            present_chunks=lost,
            stored_chunks=len(stored),
            stored_bytes=sum(sizes),
            stored_tokens=sum(map(transfer.tokens_in, sizes)),
        )
        if self._queue is not None and stored:
            self._queue.accept([transfer.keys[at] for at in stored])
        return len(stored) + lost
