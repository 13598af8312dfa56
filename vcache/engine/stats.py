"""What an engine counts, and how it says that something failed: once, not once per request."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Final

from vcache.limits import FAILURE_LOG_INTERVAL_S
from vcache.logs import Line

_log = logging.getLogger(__name__)

_COUNTERS: Final = (
    "lookup_calls",
    "lookup_tokens",
    "lookup_hit_tokens",
    "hits",
    "misses",
    "store_calls",
    "stored_chunks",
    "stored_tokens",
    "stored_bytes",
    "present_chunks",
    "unstored_chunks",
    "retrieve_calls",
    "retrieved_chunks",
    "retrieved_tokens",
    "retrieved_bytes",
    "tier_hits",
    "tier_promoted_chunks",
    "tier_written_chunks",
    "tier_dropped_chunks",
    "tier_refused_chunks",
    "tier_late_calls",
    "tier_skipped_calls",
    "tier_prefetched_chunks",
)
_SECONDS: Final = ("lookup_seconds", "store_seconds", "retrieve_seconds", "gather_seconds", "scatter_seconds")


class Cause(Enum):
    """Why chunks were missed or not stored; the value names the counter."""

    NO_SERVER = "failed_no_server"
    REFUSED = "failed_refused"
    MALFORMED = "failed_malformed"
    FULL_POOL = "failed_full_pool"
    STALE = "failed_stale"
    DEAD_HOLDER = "failed_dead_holder"
    OTHER_MEMORY = "failed_other_memory"
    FENCE_BROKEN = "failed_fence_broken"
    TIER = "failed_tier"
    TIER_QUEUE_FULL = "failed_tier_queue_full"
    ASYNC_LIMIT = "failed_async_limit"


class Counters:
    """Counters of one engine, all zero at first. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: dict[str, int] = dict.fromkeys((*_COUNTERS, *(cause.value for cause in Cause)), 0)
        self._seconds: dict[str, float] = dict.fromkeys(_SECONDS, 0.0)
        self._logged_at: dict[Cause, float] = {}
        self._unlogged: dict[Cause, int] = {}

    def add(self, **counts: int) -> None:
        """Add to counters by name."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    @contextmanager
    def seconds(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to the seconds called `name`."""
        started = self._clock()
        try:
            yield
        finally:
            took = self._clock() - started
            with self._lock:
                self._seconds[name] += took

    def failed(self, cause: Cause, why: object, **fields: object) -> None:
        """Count a failure; log it, but of one cause at most once in FAILURE_LOG_INTERVAL_S."""
        with self._lock:
            self._counts[cause.value] += 1
            now = self._clock()
            last = self._logged_at.get(cause)
            if last is not None and now - last < FAILURE_LOG_INTERVAL_S:
                self._unlogged[cause] = self._unlogged.get(cause, 0) + 1
                return
            self._logged_at[cause] = now
            unlogged = self._unlogged.pop(cause, 0)
        if unlogged:
            fields["unlogged"] = unlogged
        _log.warning(Line(f"{cause.value.replace('_', ' ')}: {why}", **fields))

    def snapshot(self) -> dict[str, int | float]:
        """All of them as they are now."""
        with self._lock:
            return {**self._counts, **self._seconds}
