"""Where chunks are, without reading them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from vcache.engine.lower import LowerTiers
from vcache.engine.pool import Pool
from vcache.engine.prefetch import Prefetch
from vcache.limits import KEYS_PER_REQUEST_MAX


class Location(IntEnum):
    """Where a chunk is."""

    POOL = 0
    LOWER_TIER = 1
    NOWHERE = -1


class Lookup:
    """Looks in the pool and then in the lower tiers. Thread-safe.

    prefetch: what loads chunks that are found below; None: nothing does.
    """

    def __init__(self, pool: Pool, lower: LowerTiers, prefetch: Prefetch | None = None) -> None:
        self._pool = pool
        self._lower = lower
        self._prefetch = prefetch

    def possible(self) -> bool:
        """Whether anything can be found at all; that the server is not there is counted."""
        return bool(self._lower) or self._pool.connected()

    def prefix(self, keys: Sequence[bytes], whole: int | None = None) -> int:
        """How many leading keys are in the pool or below.

        whole: how many of the keys are of whole chunks, which may be prefetched; None: all.
        """
        found = 0
        while found < len(keys):
            part = keys[found : found + KEYS_PER_REQUEST_MAX]
            there = self._prefix(part, len(part) if whole is None else whole - found)
            found += there
            if there < len(part):
                break
        return found

    def where(self, key: bytes) -> Location:
        """Where one chunk is."""
        if self._pool.contains([key])[0]:
            return Location.POOL
        return Location.LOWER_TIER if self._lower.contains([key])[0] else Location.NOWHERE

    def _prefix(self, keys: Sequence[bytes], whole: int) -> int:
        found = self._pool.lookup(keys)
        if found == len(keys) or not self._lower:
            return found
        rest = keys[found:]
        flags = self._pool.contains(rest)
        missing = [at for at, there in enumerate(flags) if not there]
        for at, below in zip(missing, self._lower.contains([rest[at] for at in missing]), strict=True):
            flags[at] = below
        leading = flags.index(False) if False in flags else len(flags)
        if self._prefetch is not None:
            self._prefetch.want([rest[at] for at in missing if at < leading and found + at < whole])
        return found + leading
