"""The lower tiers as the engine sees them: in order, and whatever goes wrong in one is a miss there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from vcache.engine.lanes import PAST, Lanes
from vcache.engine.stats import Cause, Counters
from vcache.tiers import Tier

Answer = TypeVar("Answer")


class LowerTiers:
    """Some tiers, the fastest first, perhaps none. Thread-safe; nothing that a tier raises leaves it.

    Tiers see host memory only: what lies on a GPU goes through pinned memory, on a lane of `lanes`.
    """

    def __init__(
        self, tiers: Sequence[Tier], layout: bytes, counters: Counters, lanes: Lanes | None = None
    ) -> None:
        self._tiers = tuple(tiers)
        self._layout = layout
        self._counters = counters
        self._lanes = lanes or Lanes()

    def __bool__(self) -> bool:
        return bool(self._tiers)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Of each key, whether some tier has it."""
        found = [False] * len(keys)
        for tier in self._tiers:
            missing = [at for at, there in enumerate(found) if not there]
            if not missing:
                break
            asked = [keys[at] for at in missing]
            nothing = [False] * len(asked)
            for at, there in zip(
                missing, self._ask(tier, partial(tier.contains, asked), nothing), strict=False
            ):
                found[at] = bool(there)
        return found

    def get(self, key: bytes, into: Tensor) -> bool:
        """Fill `into` from the first tier that can; whether one could."""
        if into.device.type == "cpu":
            return self._get(key, into)
        staged = torch.empty(len(into), dtype=torch.uint8, pin_memory=True)
        if not self._get(key, staged):
            return False
        self._lanes.on(into.device).run(lambda: into.copy_(staged, non_blocking=True), PAST).wait()
        return True

    def put(self, key: bytes, chunk: Tensor) -> None:
        """Have every tier keep a copy."""
        if chunk.device.type != "cpu":
            staged = torch.empty(len(chunk), dtype=torch.uint8, pin_memory=True)
            source = chunk
            self._lanes.on(chunk.device).run(lambda: staged.copy_(source, non_blocking=True), PAST).wait()
            chunk = staged
        for tier in self._tiers:
            self._ask(tier, partial(tier.put, key, chunk, self._layout), None)

    def _get(self, key: bytes, into: Tensor) -> bool:
        return any(self._ask(tier, partial(tier.get, key, into, self._layout), False) for tier in self._tiers)

    def _ask(self, tier: Tier, request: Callable[[], Answer], otherwise: Answer) -> Answer:
        try:
            return request()
        except (
            Exception
        ) as error:  # a tier is a plugin: whatever it raises must not reach the engine's caller
            self._counters.failed(Cause.TIER, repr(error), tier=tier.name)
            return otherwise
