"""Loading into the pool what a lookup found below, before anybody retrieves it."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from vcache.client import Reservation
from vcache.engine.lower import Late, LowerTiers
from vcache.engine.passages import Passage
from vcache.engine.pool import Pool
from vcache.engine.promotion import leave_lent, promote
from vcache.engine.stats import Cause, Counters
from vcache.errors import LocalStateError
from vcache.limits import PREFETCH_CHUNKS_MAX, TIER_DRAIN_S, TIER_LOAD_CHUNKS_MAX
from vcache.logs import Line
from vcache.tiers import Found

_log = logging.getLogger(__name__)


class Prefetch:
    """Loads whole chunks of `chunk_bytes` in a thread of its own. What finds its queue full is not loaded."""

    def __init__(self, pool: Pool, lower: LowerTiers, chunk_bytes: int, counters: Counters) -> None:
        self._pool = pool
        self._lower = lower
        self._chunk_bytes = chunk_bytes
        self._counters = counters
        self._wanted: OrderedDict[bytes, None] = OrderedDict()
        self._loading: frozenset[bytes] = frozenset()
        self._is_ending = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def want(self, keys: Sequence[bytes]) -> None:
        """Have chunks loaded, in this order; returns at once."""
        with self._changed:
            for key in keys:
                if self._is_ending or len(self._wanted) >= PREFETCH_CHUNKS_MAX:
                    break
                if key not in self._loading:
                    self._wanted.setdefault(key)
            if self._wanted and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="vcache-prefetch", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait_for(self, key: bytes, timeout_s: float) -> bool:
        """Whether a chunk was on its way; by now it has come, or will not, or `timeout_s` have passed."""
        with self._changed:
            if not self._is_coming(key):
                return False
            self._changed.wait_for(lambda: not self._is_coming(key), timeout_s)
            return True

    def forget(self, keys: Sequence[bytes] | None) -> None:
        """Do not begin to load these (None: any). What is being loaded is stopped by `Passages.closed`."""
        with self._changed:
            for key in list(self._wanted) if keys is None else keys:
                self._wanted.pop(key, None)

    def close(self) -> None:
        """Load no more; waits, bounded, for what is under way."""
        with self._changed:
            self._is_ending = True
            self._wanted.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(TIER_DRAIN_S)

    def _is_coming(self, key: bytes) -> bool:
        return key in self._loading or key in self._wanted

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._is_ending)
                if self._is_ending:
                    return
                keys = [self._wanted.popitem(last=False)[0]]
                while self._wanted and len(keys) < TIER_LOAD_CHUNKS_MAX:
                    keys.append(self._wanted.popitem(last=False)[0])
                self._loading = frozenset(keys)
            try:
                with self._lower.passages.opened(keys) as passage:
                    self._load(keys, passage)
            except LocalStateError as error:  # the client was closed under us
                _log.debug(Line("prefetch ended", reason=str(error)))
            except Exception as error:  # nobody waits for it: the thread has to outlive whatever it is
                self._counters.failed(Cause.TIER, error)
            finally:
                with self._changed:
                    self._loading = frozenset()
                    self._changed.notify_all()

    def _load(self, keys: list[bytes], passage: Passage) -> None:
        reservation = self._pool.reserve(keys)
        if reservation is None:
            return
        missing = [key for key, there in zip(keys, reservation.present, strict=True) if not there]
        missing = missing[: len(reservation.extents)]
        found: list[Found] = []
        lent: list[int] = []
        try:
            found, late = self._read(missing, reservation, passage)
            lent = [] if late is None else [len(found)]
        finally:
            self._pool.abort(np.delete(reservation.extents, [*range(len(found)), *lent]))
        sizes = [self._chunk_bytes] * len(found)
        kept = range(len(found))
        count = promote(self._pool, reservation, kept, missing[: len(found)], sizes, found, passage)
        self._counters.add(tier_prefetched_chunks=count)

    def _read(
        self, keys: list[bytes], reservation: Reservation, passage: Passage
    ) -> tuple[list[Found], Late | None]:
        """Read leading chunks into the first extents, up to one that cannot be had or comes late."""
        found: list[Found] = []
        sizes = [self._chunk_bytes] * len(keys)
        with self._pool.borrowed(reservation.extents[: len(keys)], sizes, reservation.lineage) as views:
            for at, key in enumerate(keys):
                if not passage.is_open(key):
                    break
                view = views[at]
                answer = None if view is None else self._lower.get(key, view)
                del view
                if isinstance(answer, Late):
                    leave_lent(self._pool, reservation, at, answer)
                    return found, answer
                if answer is None:
                    break
                found.append(answer)
        return found, None
