"""What an engine does between the pool and its lower tiers in the background."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from vcache.client import Client
from vcache.config import Config
from vcache.engine.lower import LowerTiers
from vcache.engine.pool import Pool
from vcache.engine.prefetch import Prefetch
from vcache.engine.stats import Counters
from vcache.engine.tier_queue import TierQueues
from vcache.engine.write_back import WriteBack


class TierWork:
    """Writes chunks below and loads them ahead, as configured; without tiers it does nothing. Thread-safe.

    prefetch: what loads ahead of a retrieve; None: nothing does. stored_to: where chunks go when they were
    stored; None: nowhere, or only when they are about to be evicted.
    """

    def __init__(
        self,
        client: Client,
        pool: Pool,
        lower: LowerTiers,
        counters: Counters,
        *,
        config: Config,
        chunk_bytes: int,
    ) -> None:
        self.prefetch: Prefetch | None = None
        self.stored_to: TierQueues | None = None
        self._queue: TierQueues | None = None
        self._made = ExitStack()
        if not lower:
            return
        capacity_chunks, ttl_s = config.engine.tier_queue_chunks, config.server.default_ttl_s
        with ExitStack() as made:
            self._queue = TierQueues(pool, lower, capacity_chunks, counters, ttl_s=ttl_s)
            made.callback(self._queue.close)
            if config.tiers.policy == "write-back":
                made.callback(WriteBack(client, self._queue).close)
            else:
                self.stored_to = self._queue
            if config.tiers.prefetch:
                self.prefetch = Prefetch(pool, lower, chunk_bytes, counters)
                made.callback(self.prefetch.close)
            self._made = made.pop_all()

    @property
    def waiting_chunks(self) -> int:
        """Chunks that wait to be written, or are being written."""
        return 0 if self._queue is None else self._queue.chunks

    def forget(self, keys: Sequence[bytes] | None) -> None:
        """Stop these chunks (None: all) on their way: they would come back after they were forgotten."""
        if self.prefetch is not None:
            self.prefetch.forget(keys)
        if self._queue is not None:
            self._queue.forget(keys)

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits to be written any more; whether that came true."""
        return self._queue is None or self._queue.flush(timeout_s)

    def close(self) -> None:
        """Load nothing more; write what waits, for a while."""
        self._made.close()
