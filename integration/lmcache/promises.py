"""Holds that nobody has in his hands: pins by key, and what a lookup found for a load to come."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from vcache.engine.holds import Hold
from vcache.limits import PROMISE_S, PROMISES_MAX


class Pins:
    """Pins by chunk key, each one a hold of its own. Thread-safe."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._pins: dict[bytes, list[Hold]] = defaultdict(list)

    def __len__(self) -> int:
        with self._guard:
            return sum(map(len, self._pins.values()))

    def add(self, holds: Iterable[Hold]) -> None:
        """Keep each until it is taken."""
        with self._guard:
            for hold in holds:
                self._pins[hold.key].append(hold)

    def take(self, key: bytes) -> Hold | None:
        """One pin of that key, which is one no more; None if there is none."""
        with self._guard:
            pins = self._pins.get(key)
            if not pins:
                return None
            hold = pins.pop()
            if not pins:
                del self._pins[key]
            return hold

    def take_all(self) -> list[Hold]:
        """All pins, which are none any more."""
        with self._guard:
            pins = [hold for holds in self._pins.values() for hold in holds]
            self._pins.clear()
            return pins


class _Promise(NamedTuple):
    holds: list[Hold]
    until_s: float


class Promises:
    """Holds by the name of the lookup that took them, for PROMISE_S. Thread-safe; time is an argument."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._promises: dict[str | bytes, _Promise] = {}

    def __len__(self) -> int:
        return len(self._promises)

    @property
    def full(self) -> bool:
        """Whether another lookup would be one too many."""
        return len(self._promises) >= PROMISES_MAX

    def add(self, name: str | bytes, holds: list[Hold], now_s: float) -> list[Hold]:
        """Keep these; returns what was kept under that name before."""
        with self._guard:
            before = self._promises.pop(name, None)
            self._promises[name] = _Promise(holds, now_s + PROMISE_S)
            return before.holds if before is not None else []

    def take(self, name: str | bytes) -> list[Hold]:
        """What was kept under that name, which is kept no more."""
        with self._guard:
            promise = self._promises.pop(name, None)
            return promise.holds if promise is not None else []

    def expired(self, now_s: float) -> list[Hold]:
        """What was kept too long, which is kept no more."""
        with self._guard:
            names = [name for name, promise in self._promises.items() if promise.until_s <= now_s]
            return [hold for name in names for hold in self._promises.pop(name).holds]

    def take_all(self) -> list[Hold]:
        """All of it."""
        return self.expired(float("inf"))
