"""Chunks on their way to the lower tiers, in the background: a queue for each tier.

Write-through: chunks that were committed are `accept`ed. Write-back: chunks that are to be evicted are
`take`n.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from vcache.client import Grant, Move
from vcache.engine.lower import LowerTiers, OneTier
from vcache.engine.pool import Pool
from vcache.engine.stats import Cause, Counters
from vcache.errors import LocalStateError
from vcache.kernels.affinity import use_all_cores
from vcache.limits import KEYS_PER_REQUEST_MAX, TIER_DRAIN_S
from vcache.logs import Line
from vcache.table import Standing

_log = logging.getLogger(__name__)


class _Kept(NamedTuple):
    """What became of chunks: how many the tier has now, and how many of these it had not before."""

    chunks: int = 0
    new: int = 0


class _Waiting(NamedTuple):
    """Chunks under one pin; keys[i] lies in grant.extents[i].

    end: to be called once, when nothing here reads them any more. expires_ms: None: as of chunks that were
    stored just now. layout: None: the engine's own.
    """

    grant: Grant
    keys: list[bytes]
    end: Callable[[_Kept], None]
    expires_ms: int | None = None
    layout: bytes | None = None


class TierQueue:
    """At most `capacity_chunks` chunks wait for one tier, pinned; what finds no room stays unwritten.

    One thread pins, one writes: whoever stores waits for neither. expires_ms: gives the expiry of what is
    written now.
    """

    def __init__(
        self,
        pool: Pool,
        tier: OneTier,
        capacity_chunks: int,
        counters: Counters,
        expires_ms: Callable[[], int] = lambda: 0,
    ) -> None:
        self._pool = pool
        self._tier = tier
        self._counters = counters
        self._capacity_chunks = capacity_chunks
        self._expires_ms = expires_ms
        self._waiting: deque[_Waiting] = deque()
        self._writing: list[bytes] = []
        self._pinning: deque[list[bytes]] = deque()
        self._forgotten: set[bytes] = set()
        self._chunks = 0
        self._ending = False
        self._ended = False
        self._changed = threading.Condition()
        self._pinner = ThreadPoolExecutor(1, f"vcache-pin-{tier.name}", use_all_cores)
        self._thread = threading.Thread(target=self._run, name=f"vcache-to-{tier.name}", daemon=True)
        self._thread.start()

    @property
    def chunks(self) -> int:
        """Chunks that wait or are being written."""
        return self._chunks

    def accept(self, keys: Sequence[bytes]) -> None:
        """Have the pool's chunks of `keys` written below; as many leading ones as there is room for."""
        with self._changed:
            takes = self._tier.is_available and not self._ending
            room = max(0, self._capacity_chunks - self._chunks) if takes else 0
            self._forgotten.difference_update(keys)
            taken = list(keys[: min(room, KEYS_PER_REQUEST_MAX)])
            if taken:
                self._chunks += len(taken)
                self._pinning.append(taken)
                try:
                    self._pinner.submit(self._pin)
                except RuntimeError:  # the interpreter ends, or there are no more threads
                    self._pinning.pop()
                    self._chunks -= len(taken)
                    taken = []
        if len(taken) < len(keys):
            self._drop(len(keys) - len(taken), is_full=takes)

    def _pin(self) -> None:
        """Pin what was accepted next, and have it written: by then it is rarely the coldest in the pool."""
        with self._changed:
            if not self._pinning:  # it was begun although it was said that it could not be
                return
            keys = self._pinning[0]
        waiting: _Waiting | None = None
        try:
            waiting = self._pinned(keys)
        except LocalStateError as error:
            _log.debug(Line("pinning for a tier ended", reason=str(error)))
        except Exception as error:  # of ours: the chunks stay where they are
            _log.exception("chunks for a lower tier could not be pinned")
            self._counters.failed(Cause.MALFORMED, repr(error))
        there = len(waiting.keys) if waiting is not None else 0
        with self._changed:
            late = self._ended
            if late:
                there = 0
            self._pinning.popleft()
            self._chunks -= len(keys) - there
            if waiting is not None and not late:
                self._waiting.append(waiting)
            self._changed.notify_all()
        if waiting is not None and late:
            self._give_back(waiting)
        if there < len(keys):
            self._counters.add(tier_dropped_chunks=len(keys) - there)

    def _pinned(self, keys: list[bytes]) -> _Waiting | None:
        """Those of the chunks that are still in the pool, pinned there; None if there are none."""
        grant = self._pool.acquire(keys, pin=True, prefix=False)
        if grant is None or not len(grant.extents):
            return None
        flags = grant.flags or [True] * len(grant.extents)
        there = [key for key, there in zip(keys, flags, strict=False) if there]
        return _Waiting(grant, there, lambda _: self._pool.release(grant))

    @staticmethod
    def _give_back(waiting: _Waiting) -> None:
        try:
            waiting.end(_Kept())
        except LocalStateError as error:  # the client was closed: its pins ended with it
            _log.debug(Line("writing to a tier ended", reason=str(error)))

    def take(self, move: Move, end: Callable[[_Kept], None], expires_ms: int) -> None:
        """Have a chunk written that is about to be evicted; `end` as in `_Waiting`. No limit counts here."""
        waiting = _Waiting(move.source, [move.key], end, expires_ms, move.layout)
        with self._changed:
            if self._tier.is_available and not self._ending:
                self._forgotten.discard(move.key)
                self._chunks += 1
                self._waiting.append(waiting)
                self._changed.notify_all()
                return
        self._drop(1)
        end(_Kept())

    def forget(self, keys: Sequence[bytes] | None) -> None:
        """See to it that these chunks (None: all that are on their way) are not in the tier in the end."""
        with self._changed:
            coming = self._coming()
            self._forgotten |= coming if keys is None else coming.intersection(keys)

    def _coming(self) -> set[bytes]:
        """Chunks that are being pinned, wait, or are being written. To be called under the lock."""
        return {key for each in self._waiting for key in each.keys}.union(self._writing, *self._pinning)

    def give_up_saving(self) -> None:
        """If the tier hangs: end what was taken for it and waits; there may be others that do not hang."""
        if self._tier.is_available:
            return
        with self._changed:
            given_up = [each for each in self._waiting if each.layout is not None]
            self._waiting = deque(each for each in self._waiting if each.layout is None)
            self._chunks -= len(given_up)
            self._changed.notify_all()
        if given_up:
            self._drop(len(given_up))
        for waiting in given_up:
            self._give_back(waiting)

    def remove(self, key: bytes) -> None:
        """Forget a chunk in the tier itself, at the latest when it answers again."""
        self._tier.take_back(key)

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits any more; whether that came true."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._chunks, timeout_s)

    def close(self) -> None:
        """Go on writing for TIER_DRAIN_S at most, then give up what still waits; ends when no copy runs."""
        _close([self])

    def end(self) -> None:
        """Take no more; the thread ends when nothing waits any more."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    def drain(self, deadline_s: float) -> None:
        """Wait until all is written; at the deadline give up what waits. Deadlines on the monotonic clock."""
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        with self._changed:
            self._ended = True
            given_up, self._waiting = list(self._waiting), deque()
            left = sum(len(waiting.keys) for waiting in given_up)
            self._chunks -= left
            self._changed.notify_all()
        if left:
            self._drop(left)
        for waiting in given_up:
            self._give_back(waiting)
        self._pinner.shutdown(wait=False)

    def leave(self, deadline_s: float) -> None:
        """Wait until no copy runs, or the deadline has come."""
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        if self._thread.is_alive():
            _log.error(Line("a lower tier hangs in a write; its thread is left behind"))

    def _drop(self, chunks: int, *, is_full: bool = False) -> None:
        """Count chunks that are not written: there is no room for them here, or the tier takes none."""
        self._counters.add(tier_dropped_chunks=chunks)
        cause = Cause.TIER_QUEUE_FULL if is_full else Cause.TIER
        why = "engine.tier_queue_chunks wait already" if is_full else "it takes nothing now"
        self._counters.failed(
            cause, f"chunks are not written below: {why}", tier=self._tier.name, chunks=chunks
        )

    def _run(self) -> None:
        use_all_cores()
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._waiting or self._ended or (self._ending and not self._pinning)
                )
                if not self._waiting:
                    return
                waiting = self._waiting.popleft()
                self._writing = waiting.keys
            kept = _Kept()
            try:
                kept = self._write(waiting)
            except LocalStateError as error:  # the client was closed under us: its pins ended with it
                _log.debug(Line("writing to a tier ended", reason=str(error)))
            except Exception as error:  # whatever a tier raises: the thread has to outlive it
                self._counters.failed(Cause.TIER, error)
            try:
                waiting.end(kept)
            except LocalStateError as error:
                _log.debug(Line("writing to a tier ended", reason=str(error)))
            finally:
                with self._changed:
                    self._chunks -= len(waiting.keys)
                    self._writing = []
                    if self._forgotten:
                        self._forgotten &= self._coming()
                    self._changed.notify_all()

    def _write(self, waiting: _Waiting) -> _Kept:
        """Write what was not forgotten here and not removed by anybody.

        Whoever removes a chunk removes it from the pool first, and from the tiers once the server has said
        that this is done. So a chunk that is written under a pin comes to rest in one of two orders. Its
        removal from the pool came before the look at the extent table that follows the write: then that look
        sees it, and the chunk is taken back here. Or it came after the look, and so after the write: then the
        remover's own removal from the tier finds what was written. Nothing is evicted while it is pinned, so
        what is taken back was not evicted; only where pins ended before their time (LOST) it might have been,
        and that costs a miss. Write-back is told by the server, when the copy ends (`Client.moved`).
        """
        grant = waiting.grant
        expires_ms = self._expires_ms() if waiting.expires_ms is None else waiting.expires_ms
        kept = new = 0
        for at, key in enumerate(waiting.keys):
            if key in self._forgotten or grant.standing(at) is Standing.REMOVED:
                continue
            with self._tier.writing(key):
                kept_one = self._write_one(waiting, at, expires_ms)
            if kept_one is None:
                self._counters.add(tier_dropped_chunks=len(waiting.keys) - at)
                break
            kept, new = kept + kept_one.chunks, new + kept_one.new
        return _Kept(kept, new)

    def _write_one(self, waiting: _Waiting, at: int, expires_ms: int) -> _Kept | None:
        """Write one chunk, and take it back if it was removed meanwhile; None if it is out of reach."""
        key, grant, is_saved = waiting.keys[at], waiting.grant, waiting.layout is not None
        part = grant.extents[at : at + 1]
        with self._pool.borrowed(part, part["length"].tolist(), grant.lineage) as views:
            # Intact and borrowed now: then pin and memory stay as they are until they are given back.
            if views[0] is None or not self._pool.intact(grant, at, at + 1):
                return None
            # What came from below and goes down again is there already.
            if is_saved and self._tier.has(key):
                return _Kept(1, 0)
            is_kept = self._tier.put(key, views[0], expires_ms, waiting.layout)
        self._counters.add(**{"tier_written_chunks" if is_kept else "tier_refused_chunks": 1})
        if key in self._forgotten or not (is_saved or grant.standing(at) is Standing.THERE):
            self._tier.take_back(key)
        return _Kept(int(is_kept), int(is_kept))


class Saved:
    """A chunk that was written to the lower tiers before its eviction, or could not be."""

    def __init__(self, key: bytes, queues: Sequence[TierQueue], end: Callable[[Saved], None]) -> None:
        """end: called once, when every queue has said what became of it."""
        self._key = key
        self._left = len(queues)
        self._end = end
        self._kept = 0
        self._new: list[TierQueue] = []
        self._guard = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._kept)

    def heard(self, queue: TierQueue, kept: _Kept) -> None:
        """One queue is done with it."""
        with self._guard:
            self._kept += kept.chunks
            self._new += [queue] if kept.new else []
            self._left -= 1
            if self._left:
                return
        self._end(self)

    def undo(self) -> None:
        """Have it removed where it was not before; a tier that had it keeps what others have put there."""
        for queue in self._new:
            queue.remove(self._key)


class TierQueues:
    """The queues of all lower tiers: a tier that is slow, or hangs, holds up no other."""

    def __init__(
        self,
        pool: Pool,
        lower: LowerTiers,
        capacity_chunks: int,
        counters: Counters,
        *,
        ttl_s: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """ttl_s: age at which the pool's chunks expire (0: never), and so their copies. clock: since 1970."""

        self._clock = clock

        def expires_ms() -> int:
            return int((clock() + ttl_s) * 1000) if ttl_s else 0

        self._queues: list[TierQueue] = []
        with ExitStack() as undo:
            for tier in lower.apart():
                queue = TierQueue(pool, tier, capacity_chunks, counters, expires_ms)
                undo.callback(queue.close)
                self._queues.append(queue)
            undo.pop_all()

    @property
    def chunks(self) -> int:
        """Chunks that wait or are being written; one that is on its way to two tiers counts twice."""
        return sum(queue.chunks for queue in self._queues)

    def accept(self, keys: Sequence[bytes]) -> None:
        """Have the pool's chunks of `keys` written to every tier that has room in its queue."""
        for queue in self._queues:
            queue.accept(keys)

    def take(self, move: Move, end: Callable[[Saved], None]) -> None:
        """Have a chunk that is about to be evicted written to every tier; `end` hears what became of it.

        It is called once, when nothing here reads the chunk any more.
        """
        expires_ms = int(self._clock() * 1000) + move.ttl_ms if move.ttl_ms else 0
        saved = Saved(move.key, self._queues, end)
        for queue in self._queues:
            queue.take(move, partial(saved.heard, queue), expires_ms)

    def give_up_saving(self) -> None:
        """As `TierQueue.give_up_saving`."""
        for queue in self._queues:
            queue.give_up_saving()

    def forget(self, keys: Sequence[bytes] | None) -> None:
        """As `TierQueue.forget`."""
        for queue in self._queues:
            queue.forget(keys)

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits any more; whether that came true."""
        deadline_s = time.monotonic() + timeout_s
        done = [queue.flush(max(0.0, deadline_s - time.monotonic())) for queue in self._queues]
        return all(done)

    def close(self) -> None:
        """As `TierQueue.close`, for all at the same time."""
        _close(self._queues)


def _close(queues: Sequence[TierQueue]) -> None:
    # Without threads: a process that ends because it may have no more of them must be able to end.
    for queue in queues:
        queue.end()
    deadline_s = time.monotonic() + TIER_DRAIN_S
    for queue in queues:
        queue.drain(deadline_s)
    deadline_s = time.monotonic() + TIER_DRAIN_S
    for queue in queues:
        queue.leave(deadline_s)
