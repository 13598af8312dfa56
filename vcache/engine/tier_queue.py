"""Write-through: chunks that were committed on their way to the lower tiers, in the background."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from vcache.client import Grant
from vcache.engine.lower import LowerTiers
from vcache.engine.pool import Pool
from vcache.engine.stats import Cause, Counters
from vcache.errors import LocalStateError
from vcache.limits import KEYS_PER_REQUEST_MAX, TIER_DRAIN_S
from vcache.logs import Line

_log = logging.getLogger(__name__)


class _Waiting(NamedTuple):
    """Chunks under one pin; keys[i] lies in grant.extents[i]."""

    grant: Grant
    keys: list[bytes]


class TierQueue:
    """At most `capacity_chunks` chunks wait for the tiers, pinned; what finds no room stays unwritten.

    One thread writes. `accept` never blocks on a tier.
    """

    def __init__(self, pool: Pool, lower: LowerTiers, capacity_chunks: int, counters: Counters) -> None:
        self._pool = pool
        self._lower = lower
        self._counters = counters
        self._capacity_chunks = capacity_chunks
        self._waiting: deque[_Waiting] = deque()
        self._chunks = 0
        self._ending = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="vcache-tiers", daemon=True)
        self._thread.start()

    @property
    def chunks(self) -> int:
        """Chunks that wait or are being written."""
        return self._chunks

    def accept(self, keys: Sequence[bytes]) -> None:
        """Have the pool's chunks of `keys` written below; as many leading ones as there is room for."""
        with self._changed:
            room = 0 if self._ending else self._capacity_chunks - self._chunks
            taken = list(keys[: min(room, KEYS_PER_REQUEST_MAX)])
            self._chunks += len(taken)
        if len(taken) < len(keys):
            self._drop(len(keys) - len(taken))
        if not taken:
            return
        waiting: _Waiting | None = None
        try:
            waiting = self._pinned(taken)
        finally:
            there = len(waiting.keys) if waiting is not None else 0
            with self._changed:
                self._chunks -= len(taken) - there
                if waiting is not None:
                    self._waiting.append(waiting)
                self._changed.notify_all()
        if there < len(taken):
            self._counters.add(tier_dropped_chunks=len(taken) - there)

    def _pinned(self, keys: list[bytes]) -> _Waiting | None:
        """Those of the chunks that are still in the pool, pinned there; None if there are none."""
        grant = self._pool.acquire(keys, pin=True, prefix=False)
        if grant is None or not len(grant.extents):
            return None
        flags = grant.flags or [True] * len(grant.extents)
        return _Waiting(grant, [key for key, there in zip(keys, flags, strict=False) if there])

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits any more; whether that came true."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._chunks, timeout_s)

    def close(self) -> None:
        """Go on writing for TIER_DRAIN_S at most, then give up what still waits; ends when no copy runs."""
        deadline_s = time.monotonic() + TIER_DRAIN_S
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        with self._changed:
            given_up, self._waiting = list(self._waiting), deque()
            left = sum(len(waiting.keys) for waiting in given_up)
            self._chunks -= left
        for waiting in given_up:
            self._pool.release(waiting.grant)
        if left:
            self._drop(left)
        self._thread.join(TIER_DRAIN_S)
        if self._thread.is_alive():
            _log.error(Line("a lower tier hangs in a write; its thread is left behind"))

    def _drop(self, chunks: int) -> None:
        self._counters.add(tier_dropped_chunks=chunks)
        self._counters.failed(
            Cause.TIER_QUEUE_FULL, "chunks are not written to the lower tiers", chunks=chunks
        )

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ending)
                if not self._waiting:
                    return
                waiting = self._waiting.popleft()
            try:
                self._write(waiting)
                self._pool.release(waiting.grant)
            except LocalStateError as error:  # the client was closed under us: its pins ended with it
                _log.debug(Line("write-through ended", reason=str(error)))
            except Exception as error:  # whatever a tier raises: the thread has to outlive it
                self._counters.failed(Cause.TIER, error)
                self._pool.release(waiting.grant)
            finally:
                with self._changed:
                    self._chunks -= len(waiting.keys)
                    self._changed.notify_all()

    def _write(self, waiting: _Waiting) -> None:
        extents, grant = waiting.grant.extents, waiting.grant
        for at, key in enumerate(waiting.keys):
            part = extents[at : at + 1]
            with self._pool.borrowed(part, part["length"].tolist(), grant.lineage) as views:
                # Intact and borrowed now: then pin and memory stay as they are until they are given back.
                if views[0] is None or not self._pool.intact(grant, at, at + 1):
                    self._counters.add(tier_dropped_chunks=len(waiting.keys) - at)
                    return
                self._lower.put(key, views[0])
            self._counters.add(tier_written_chunks=1)
