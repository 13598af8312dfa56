"""The lower tiers as the engine sees them: in order, and whatever goes wrong in one is a miss there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from vcache.engine.lanes import PAST, Lanes
from vcache.engine.passages import Passages
from vcache.engine.stats import Counters
from vcache.engine.tier_calls import TierCalls
from vcache.limits import TTL_MS_MAX
from vcache.tiers import Found, Tier


class Read:
    """One chunk to be read from the tiers, in their order, into memory that is lent to each of their calls.

    Whoever waits for `found` looks afterwards, also after an exception, whether the memory is his again.
    """

    def __init__(
        self,
        tiers: Sequence[TierCalls],
        get: Callable[[Tier], Found | None],
        *,
        lends: bool = True,
        arrive: Callable[[], object] = int,
    ) -> None:
        """lends: False if `get` reads into memory of its own, from which `arrive` brings the chunk."""
        self._tiers = tiers
        self._get = get
        self._lends = lends
        self._arrive = arrive
        self._guard = threading.Lock()
        self._is_lent = False
        self._then: list[Callable[[], None]] = []

    def found(self) -> Found | None:
        """What the first tier that could gave; None: none could, or one gave nothing by its deadline."""
        for calls in self._tiers:
            self._is_lent = self._lends
            deadline_s = calls.deadline_s()
            call = calls.begin(partial(self._carry_out, calls.tier))
            if call is None:
                self._is_lent = False
                continue
            found = calls.finish(call, None, deadline_s)
            if found is not None:
                self._arrive()
                return found
            if not call.wait(0):
                return None  # no other tier may write there now
        return None

    @property
    def is_over(self) -> bool:
        """Whether no tier's call writes to the memory, now or later."""
        return not self._is_lent

    def when_over(self, then: Callable[[], None]) -> None:
        """Call `then` when that is so: now, or in the thread of the call that has returned."""
        with self._guard:
            if self._is_lent:
                self._then.append(then)
                return
        then()

    def _carry_out(self, tier: Tier) -> Found | None:
        try:
            return self._get(tier)
        finally:
            with self._guard:
                self._is_lent = False
                then, self._then = self._then, []
            for each in then:
                each()


class LowerTiers:
    """Some tiers, the fastest first, perhaps none. Thread-safe; nothing that a tier raises leaves it.

    Tiers see host memory only: what lies on a GPU goes through pinned memory, on a lane of `lanes`.
    deadline_s: of one call. passages: of what is brought up from here.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        layout: bytes,
        counters: Counters,
        lanes: Lanes | None = None,
        *,
        deadline_s: float = 10.0,
    ) -> None:
        self._calls = tuple(TierCalls(tier, counters, deadline_s) for tier in tiers)
        self._layout = layout
        self._lanes = lanes or Lanes()
        self.passages = Passages()

    def __bool__(self) -> bool:
        return bool(self._calls)

    def apart(self) -> list[OneTier]:
        """Each tier by itself, for who writes."""
        return [OneTier(calls, self._layout, self._lanes, self.passages) for calls in self._calls]

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Of each key, whether some tier has it."""
        found = [False] * len(keys)
        for calls in self._calls:
            missing = [at for at, there in enumerate(found) if not there]
            if not missing:
                break
            asked = [keys[at] for at in missing]
            nothing = [False] * len(asked)
            answer = calls.ask(partial(calls.tier.contains, asked), nothing)
            for at, there in zip(missing, answer, strict=False):
                found[at] = bool(there)
        return found

    def read(self, key: bytes, into: Tensor) -> Read:
        """To fill `into` from the first tier that can."""
        if into.device.type == "cpu":
            return Read(self._calls, lambda tier: tier.get(key, into, self._layout))
        staged = torch.empty(len(into), dtype=torch.uint8, pin_memory=True)

        def arrive() -> None:
            self._lanes.on(into.device).run(lambda: into.copy_(staged, non_blocking=True), PAST).wait()

        return Read(self._calls, lambda tier: tier.get(key, staged, self._layout), lends=False, arrive=arrive)

    def put(self, key: bytes, chunk: Tensor, expires_ms: int = 0) -> bool:
        """Have every tier keep a copy; whether one does."""
        kept = [one.put(key, chunk, expires_ms) for one in self.apart()]
        return any(kept)

    def remove(self, keys: Sequence[bytes]) -> int:
        """Forget chunks in every tier; how many copies there were."""
        return sum(calls.ask(partial(calls.tier.remove, list(keys)), 0) for calls in self._calls)

    def clear(self) -> bool:
        """Forget all chunks in every tier; whether every tier has."""
        cleared = [calls.ask(partial(_cleared, calls.tier), False) for calls in self._calls]
        return all(cleared)

    def close(self) -> None:
        """Make no more calls; the tiers themselves stay open."""
        for calls in self._calls:
            calls.close()


class OneTier:
    """One lower tier, for the thread that writes it."""

    def __init__(self, calls: TierCalls, layout: bytes, lanes: Lanes, passages: Passages) -> None:
        self._calls = calls
        self._layout = layout
        self._lanes = lanes
        self._passages = passages

    @property
    def name(self) -> str:
        """What counters and log lines call it."""
        return self._calls.tier.name

    @property
    def is_available(self) -> bool:
        """Whether it takes chunks now."""
        return self._calls.is_available

    def put(self, key: bytes, chunk: Tensor, expires_ms: int = 0, layout: bytes | None = None) -> bool:
        """Have it keep a copy, however long that takes; whether it does. layout: None: the engine's own."""
        if chunk.device.type != "cpu":
            staged = torch.empty(len(chunk), dtype=torch.uint8, pin_memory=True)
            source = chunk
            self._lanes.on(chunk.device).run(lambda: staged.copy_(source, non_blocking=True), PAST).wait()
            chunk = staged
        put = partial(self._calls.tier.put, key, chunk, layout or self._layout, expires_ms)
        return self._calls.write(put)

    def writing(self, key: bytes) -> AbstractContextManager[None]:
        """Put a chunk in this block, and perhaps take it back: meanwhile it is not brought up from here."""
        return self._passages.closed([key])

    def take_back(self, key: bytes) -> None:
        """Forget a chunk that was put and must not stay, also while the tier is left alone: then once it
        answers again.
        """
        self._calls.insist(partial(self._calls.tier.remove, [key]))

    def has(self, key: bytes) -> bool:
        """Whether it has a chunk."""
        return bool(self._calls.ask(partial(self._calls.tier.contains, [key]), [False])[0])


def _cleared(tier: Tier) -> bool:
    tier.clear()
    return True


def ttl_left_ms(found: Found, clock: Callable[[], float] = time.time) -> int:
    """The time to live of a chunk that is promoted, as `Client.commit` wants it: what its record has left.

    -1 where it has none: then the server's default counts.
    """
    if not found.expires_ms:
        return -1
    return min(max(found.expires_ms - int(clock() * 1000), 1), TTL_MS_MAX)
