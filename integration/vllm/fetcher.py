"""A worker's lower tiers: chunks are brought up, and all of them forgotten, in threads of its own."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor

from integration.vllm.below import Below
from integration.vllm.done import Done, Work
from integration.vllm.groups import Groups
from integration.vllm.hits import first_needed, longest_hit
from integration.vllm.messages import Fetch, Orders, Place
from integration.vllm.pools import started
from vcache.engine.stats import Cause, Counters
from vcache.kernels.affinity import use_all_cores

_log = logging.getLogger("vcache.integration.vllm")

_THREADS = 2
"""A lower tier that is slow to answer for one request holds up one of them."""

_BEGINS_S = 2.0
"""A fetch that has waited longer than this, and than a request waits for it, is given up: prompts come faster
than the tiers answer, and what waits here would be more and more.
"""


class Fetcher:
    """Carries out fetches, each of which is reported once. Whatever goes wrong below is a miss, counted.

    belows: of each group, or None; to be filled before the first fetch. place: of this rank.
    """

    def __init__(self, groups: Groups, patience_s: float, counters: Counters, done: Done) -> None:
        """patience_s: how long a request waits for a fetch."""
        self.belows: list[Below | None] = []
        self.place: Place = (0, 0)
        self._groups = groups
        self._patience_s = patience_s
        self._counters = counters
        self._done = done
        self._threads = started(ThreadPoolExecutor(_THREADS, "vcache-fetch", use_all_cores), _THREADS)

    def begin(self, orders: Orders) -> None:
        """Begin to bring chunks up; requests that want them are not scheduled yet."""
        self._done.begin(Work.FETCH, len(orders.fetches) + orders.forget)
        began_s = time.monotonic()
        for fetch in orders.fetches:
            try:
                self._threads.submit(self._fetch, fetch, began_s)
            except RuntimeError:  # closed
                self._fetched(fetch, 0)
        if orders.forget:
            try:
                self._threads.submit(self._forget)
            except RuntimeError:  # closed
                self._forgot()

    def stop(self) -> None:
        """Begin nothing any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """End what the tiers still do, and wait for it, bounded."""
        self.stop()
        for below in self.belows:
            if below is not None:
                below.close()  # ends what a fetch waits for
        self.settle()

    def settle(self) -> None:
        """Wait for what has begun; nothing begins any more."""
        self._threads.shutdown(wait=True)

    def _fetch(self, fetch: Fetch, began_s: float) -> None:
        brought = 0
        try:
            if time.monotonic() - began_s <= max(self._patience_s, _BEGINS_S):
                brought = self._bring(fetch, began_s + self._patience_s)
        except Exception as error:  # of ours or a tier's: a miss
            _log.exception("nothing was fetched from lower tiers")
            self._counters.failed(Cause.TIER, repr(error))
        finally:
            self._fetched(fetch, brought)

    def _bring(self, fetch: Fetch, deadline_s: float) -> int:
        """Bring up what the longest hit needs, of pool and tiers together; how many chunks were below."""
        looked = [
            (below, part.group, below.look(part.keys[self.place]))
            for part in fetch.parts
            if (below := self.belows[part.group]) is not None
        ]
        if not looked:
            return 0
        tokens = self._groups.chunk_tokens
        windows = [self._groups.groups[group].window_tokens for _, group, _ in looked]
        end = longest_hit([seen.there for *_, seen in looked], windows, first=0, chunk_tokens=tokens)
        return sum(
            below.bring(
                seen,
                range(first_needed(end, 0, tokens, window), end),
                within_s=max(0.0, deadline_s - time.monotonic()),
            )
            for (below, _, seen), window in zip(looked, windows, strict=True)
        )

    def _fetched(self, fetch: Fetch, brought: int) -> None:
        with self._done.end(Work.FETCH) as finished:
            finished.report.fetches[fetch.id] = 1
            finished.report.fetched[fetch.id] = brought

    def _forget(self) -> None:
        try:
            for below in self.belows:
                if below is not None:
                    self._empty(below)
        finally:
            self._forgot()

    def _empty(self, below: Below) -> None:
        """Whatever one group's tiers do, those of the others are emptied, too."""
        try:
            below.forget()
        except Exception:
            _log.exception("lower tiers were not emptied")

    def _forgot(self) -> None:
        with self._done.end(Work.FETCH) as finished:
            finished.report.forgotten += 1
