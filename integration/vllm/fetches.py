"""Chunks that the pool lacks and a lower tier may have: workers are ordered to bring them up before a request
is told what it can load.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from integration.vllm.groups import Groups
from integration.vllm.keys import ChunkKeys
from integration.vllm.messages import Fetch, FetchPart, Report
from integration.vllm.tracked import Tracked
from vcache.limits import PREFETCH_CHUNKS_MAX

_STEPS_MIN = 3
"""Steps that an order is waited for, however long they take: the one that carries it may begin it only when
its own work is done, another one brings the answer, and with asynchronous scheduling one more is ahead.
"""


@dataclass
class _Fetching:
    """An order under way: how many ranks have still to report, whether any brought something, and until when
    it is waited for; steps: that have left since.
    """

    ranks: int
    deadline_s: float
    brought: bool = False
    steps: int = 0

    @property
    def is_awaited(self) -> bool:
        """Whether it may still bring something in time."""
        return self.ranks > 0 and (time.monotonic() < self.deadline_s or self.steps < _STEPS_MIN)


class Fetches:
    """The orders to bring chunks up. enabled: whether there is a lower tier. ranks: that have to report.

    patience_s: how long a request waits for them; what comes later is found by later requests.
    """

    def __init__(
        self, groups: Groups, keys: ChunkKeys, *, enabled: bool, ranks: int, patience_s: float
    ) -> None:
        self._groups = groups
        self._keys = keys
        self._enabled = enabled
        self._ranks = ranks
        self._patience_s = patience_s
        self._running: dict[int, _Fetching] = {}
        self._last = 0
        self._ordered: list[Fetch] = []
        self._forget = False
        self._forgetting = 0

    @property
    def busy(self) -> bool:
        """Whether workers have to be heard of lower tiers although no request waits."""
        return bool(self._forget or self._forgetting)

    def take_orders(self) -> tuple[list[Fetch], bool]:
        """What was ordered since the last call: chunks to bring, and whether to forget all that is below."""
        ordered, self._ordered = self._ordered, []
        forget, self._forget = self._forget, False
        for fetching in self._running.values():
            fetching.steps += 1
        return ordered, forget

    def begin(self, tracked: Tracked, first: int, end: int) -> bool:
        """Order chunks `first` … `end` - 1 of a request; whether it has to wait.

        Not while tiers are emptied, nor chunks that were ordered before, which the pool may have lost again
        meanwhile, nor once the request has waited for `patience_s` in all.
        """
        if not self._enabled or self.busy or first >= end or first <= tracked.fetched_from:
            return False
        now_s = time.monotonic()
        if tracked.fetched_from < 0:
            tracked.fetch_deadline_s = now_s + self._patience_s
        elif now_s >= tracked.fetch_deadline_s:
            return False
        tracked.fetched_from = first
        chunks = range(first, min(end, first + PREFETCH_CHUNKS_MAX))
        hashes = tracked.request.block_hashes
        parts = tuple(
            FetchPart(at, self._keys.of_all_places(hashes, chunks, at, tracked.adapter))
            for at in range(len(self._groups))
        )
        self._last += 1
        self._running[self._last] = _Fetching(self._ranks, tracked.fetch_deadline_s)
        self._ordered.append(Fetch(self._last, parts))
        tracked.fetch = self._last
        return True

    def outcome(self, tracked: Tracked) -> bool | None:
        """Whether what a request waits for brought something to the pool; None: not known yet."""
        fetching = None if tracked.fetch is None else self._running.get(tracked.fetch)
        if fetching is not None and fetching.is_awaited:
            return None
        self.leave(tracked)
        return fetching is not None and (fetching.brought or fetching.ranks > 0)

    def leave(self, tracked: Tracked) -> None:
        """A request waits no longer."""
        if tracked.fetch is not None:
            self._running.pop(tracked.fetch, None)
            tracked.fetch = None

    def forget(self) -> None:
        """Have workers forget what they keep below, and fetch nothing until they have, each time that it was
        ordered.
        """
        self._ordered = []
        if self._enabled and not self._forget:
            self._forget = True
            self._forgetting += self._ranks

    def reported(self, report: Report) -> None:
        """Workers are through with orders."""
        self._forgetting = max(0, self._forgetting - report.forgotten)
        for number, ranks in report.fetches.items():
            fetching = self._running.get(number)
            if fetching is not None:
                fetching.ranks -= ranks
                fetching.brought |= bool(report.fetched.get(number))
