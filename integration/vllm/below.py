"""One KV group's lower tiers on one rank: what is stored goes down, what is wanted comes up into the pool."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from vcache.config import Config
from vcache.engine.lower import LowerTiers
from vcache.engine.pool import Pool
from vcache.engine.prefetch import Prefetch
from vcache.engine.stats import Counters
from vcache.engine.tier_queue import TierQueues
from vcache.layout import KVLayout
from vcache.tiers import Tier

_log = logging.getLogger("vcache.integration.vllm")


@dataclass(frozen=True)
class Seen:
    """Where some chunks were found. below: those that only a tier has. forgotten: how often the tiers were
    emptied before.
    """

    keys: tuple[bytes, ...]
    in_pool: tuple[bool, ...]
    below: frozenset[bytes]
    forgotten: int

    @property
    def there(self) -> list[bool]:
        """Of each chunk, whether it is anywhere."""
        return [is_there or key in self.below for key, is_there in zip(self.keys, self.in_pool, strict=True)]


class Below:
    """Thread-safe; whatever goes wrong below is a miss, counted. The tiers stay the caller's to close.

    queue: what the pool's chunks are written by.
    """

    def __init__(
        self, pool: Pool, tiers: Sequence[Tier], layout: KVLayout, counters: Counters, config: Config
    ) -> None:
        deadline_s = config.tiers.deadline_ms / 1e3
        self._pool = pool
        self._lower = LowerTiers(tiers, layout.fingerprint, counters, deadline_s=deadline_s)
        chunks, ttl_s = config.engine.tier_queue_chunks, config.server.default_ttl_s
        self.queue = TierQueues(pool, self._lower, chunks, counters, ttl_s=ttl_s)
        self._prefetch = Prefetch(pool, self._lower, layout.chunk_bytes, counters)
        self._guard = threading.Lock()
        self._forgotten = 0
        self._forgetting = 0
        self._emptying = threading.Lock()
        self._is_stale = False

    def look(self, keys: Sequence[bytes]) -> Seen:
        """What the pool and the tiers have of these chunks."""
        forgotten = self._forgotten
        in_pool = self._pool.contains(keys)
        missing = [key for key, is_there in zip(keys, in_pool, strict=True) if not is_there]
        if not missing or (self._is_stale and not self._empty()):
            return Seen(tuple(keys), tuple(in_pool), frozenset(), forgotten)
        found = self._lower.contains(missing)
        below = frozenset(key for key, is_there in zip(missing, found, strict=True) if is_there)
        return Seen(tuple(keys), tuple(in_pool), below, forgotten)

    def bring(self, seen: Seen, wanted: range, *, within_s: float) -> int:
        """Have those of the chunks `wanted` that are below loaded into the pool; how many these are. Returns
        when they are there, or will not come, or after `within_s`.
        """
        deadline_s = time.monotonic() + within_s
        keys = [key for key in seen.keys[wanted.start : wanted.stop] if key in seen.below]
        with self._guard:
            # What was found is of before; or of a tier that has still to be emptied.
            if self._forgetting or self._is_stale or self._forgotten != seen.forgotten:
                return 0
            self._prefetch.want(keys)
        for key in keys:
            self._prefetch.wait_for(key, max(0.0, deadline_s - time.monotonic()))
        return len(keys)

    def forget(self) -> None:
        """Forget all that the tiers have, of every model, and what is on its way to and from them; with what
        has come up meanwhile the pool forgets all chunks of this one. Nothing is brought from tiers that
        cannot be emptied now before they are.
        """
        with self._guard:
            self._forgotten += 1
            self._forgetting += 1
        try:
            with self._lower.passages.closed(None):
                self._prefetch.forget(None)
                self.queue.forget(None)
                self._pool.clear()
                if not self._empty():
                    _log.warning("a lower tier was not emptied; nothing is brought up before it is")
        finally:
            with self._guard:
                self._forgotten += 1  # void is also what was looked for meanwhile
                self._forgetting -= 1

    def close(self) -> None:
        """Wait, bounded, for what is under way."""
        self._prefetch.close()
        self.queue.close()
        self._lower.close()

    def _empty(self) -> bool:
        with self._emptying:
            self._is_stale = not self._lower.clear()
            return not self._is_stale
