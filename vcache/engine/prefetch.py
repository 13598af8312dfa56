"""Loading into the pool what a lookup found below, before anybody retrieves it."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence

from vcache.engine.lower import LowerTiers
from vcache.engine.passages import Passage
from vcache.engine.pool import Pool
from vcache.engine.promotion import Landing
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
                thread = threading.Thread(target=self._run, name="vcache-prefetch", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the process may have no more: who wants the chunks loads them
                    self._wanted.clear()
                    return
                self._thread = thread
            self._changed.notify_all()

    def wait_for(self, key: bytes, timeout_s: float) -> None:
        """Wait until a chunk that was on its way has come, or will not, or `timeout_s` have passed."""
        with self._changed:
            self._changed.wait_for(lambda: key not in self._loading and key not in self._wanted, timeout_s)

    def has_brought(self, key: bytes, timeout_s: float) -> bool:
        """Whether a chunk was being loaded, and by now, after `timeout_s` at most, has come or will not.

        What only waits to be loaded is the caller's from now on: he shall not wait for what others wanted.
        """
        with self._changed:
            self._wanted.pop(key, None)
            if key not in self._loading:
                return False
            return self._changed.wait_for(lambda: key not in self._loading, timeout_s)

    def forget(self, keys: Sequence[bytes] | None) -> None:
        """Do not begin to load these (None: any). What is being loaded is stopped by `Passages.closed`."""
        with self._changed:
            for key in list(self._wanted) if keys is None else keys:
                self._wanted.pop(key, None)
            self._changed.notify_all()

    def close(self) -> None:
        """Load no more; waits, bounded, for what is under way."""
        with self._changed:
            self._is_ending = True
            self._wanted.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(TIER_DRAIN_S)

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
        sizes = [self._chunk_bytes] * len(missing)
        with Landing(self._pool, reservation, sizes) as landing:
            found = self._read(missing, landing, passage)
            count = landing.promote(range(len(found)), missing[: len(found)], found, passage)
        self._counters.add(tier_prefetched_chunks=count)

    def _read(self, keys: list[bytes], landing: Landing, passage: Passage) -> list[Found]:
        """Read leading chunks into the first extents, up to one that cannot be had or comes late."""
        found: list[Found] = []
        for at, key in enumerate(keys[: len(landing.views)]):
            if landing.views[at] is None or not passage.is_open(key):
                break
            answer = landing.read(self._lower, key, at)
            if answer is None:
                break
            found.append(answer)
        return found
