"""A stream of a GPU that is not there: copies run when the test says so, events happen when it says so."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from vcache.engine.lanes import Event

DEADLINE_S = 30.0
"""For another thread to come as far as a test expects; reached only by a test that fails."""


class FakeEvent:
    """Happens when it is told to, well or with an error."""

    def __init__(self) -> None:
        self._happened = threading.Event()
        self._error: Exception | None = None
        self.holding: list[int] = []

    def happen(self, error: Exception | None = None) -> None:
        self._error = error
        self._happened.set()

    @property
    def has_happened(self) -> bool:
        return self._happened.is_set()

    def wait(self) -> None:
        assert self._happened.wait(DEADLINE_S), "an event that the test never let happen"
        if self._error is not None:
            raise self._error

    def hold_caller(self) -> None:
        self.holding.append(threading.get_ident())


class Queued(NamedTuple):
    copy: Callable[[], object]
    after: Event
    end: FakeEvent


class FakeStream:
    """A lane whose copies wait for `step`. `callers`: the events of `caller`, in order."""

    def __init__(self) -> None:
        self.callers: list[FakeEvent] = []
        self.queued: deque[Queued] = deque()
        self.refuse_from: int | None = None
        self._launched = 0
        self._changed = threading.Condition()

    def caller(self) -> FakeEvent:
        self.callers.append(FakeEvent())
        return self.callers[-1]

    def run(self, copy: Callable[[], object], after: Event) -> FakeEvent:
        with self._changed:
            if self.refuse_from is not None and self._launched >= self.refuse_from:
                raise RuntimeError("the launch failed")
            self._launched += 1
            self.queued.append(Queued(copy, after, FakeEvent()))
            self._changed.notify_all()
            return self.queued[-1].end

    def next(self, count: int = 1) -> Queued:
        """The oldest copy that is queued, once there are `count` of them."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.queued) >= count, DEADLINE_S), (
                "nothing was launched"
            )
            return self.queued[0]

    def step(self, error: Exception | None = None) -> None:
        """Run the oldest copy, and let its event happen."""
        queued = self.next()
        self.queued.popleft()
        if error is None:
            queued.copy()
        queued.end.happen(error)


class FakeStreams:
    """The lanes of an engine, by their first use: that of loads, which callers mark, then that of stores."""

    def __init__(self) -> None:
        self.made: list[FakeStream] = []
        self._changed = threading.Condition()

    def make(self, device: torch.device) -> FakeStream:
        with self._changed:
            self.made.append(FakeStream())
            self._changed.notify_all()
            return self.made[-1]

    @property
    def loads(self) -> FakeStream:
        return self._made(0)

    @property
    def stores(self) -> FakeStream:
        return self._made(1)

    def _made(self, at: int) -> FakeStream:
        with self._changed:
            made = self._changed.wait_for(lambda: len(self.made) > at, DEADLINE_S)
            assert made, "the engine asked for no such lane"
            return self.made[at]
