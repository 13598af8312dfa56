"""Calls of one lower tier: in threads of its own, behind a deadline and a circuit breaker.

Whoever waits gives up at the deadline. The native call does not: what it was lent stays lent until it has
really returned, and whoever lent it is told then.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from vcache.engine.stats import Cause, Counters
from vcache.engine.tier_breaker import TierBreaker
from vcache.kernels.affinity import use_all_cores
from vcache.limits import TIER_OWED_MAX, TIER_OWED_PAUSE_S, TIER_READERS
from vcache.tiers import Tier

Answer = TypeVar("Answer")


class Call(Generic[Answer]):
    """One call under way."""

    def __init__(self, request: Callable[[], Answer]) -> None:
        self._request: Callable[[], Answer] | None = request
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._is_over = False
        self._changed = threading.Condition()
        self._then: list[Callable[[], None]] = []

    def carry_out(self) -> None:
        """Make the call, in the thread that calls this."""
        request, self._request = self._request, None
        assert request is not None
        try:
            self._answer = request()
        except (
            Exception
        ) as error:  # a tier is a plugin: whatever it raises must not reach the engine's caller
            self._error = error
        del request  # what it was lent is lent no more
        with self._changed:
            self._is_over = True
            then, self._then = self._then, []
            self._changed.notify_all()
        for each in then:
            each()

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over, or is before the timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_over, max(timeout_s, 0.0))

    def when_over(self, then: Callable[[], None]) -> None:
        """Call `then` when the native call has returned: now if it has, else in the thread that made it."""
        with self._changed:
            if not self._is_over:
                self._then.append(then)
                return
        then()

    @property
    def error(self) -> BaseException | None:
        """What it raised, once it is over."""
        return self._error

    @property
    def answer(self) -> Answer | None:
        """What it returned, once it is over; None if it raised."""
        return self._answer


class TierCalls:
    """The calls of one tier. Thread-safe; threads are started on first use, and end with the process."""

    def __init__(
        self,
        tier: Tier,
        counters: Counters,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tier = tier
        self._counters = counters
        self._deadline_s = deadline_s
        self._clock = clock
        self._breaker = TierBreaker()
        self._guard = threading.Lock()
        self._waiting: queue.SimpleQueue[Call[object] | None] = queue.SimpleQueue()
        self._threads = 0
        self._busy = 0
        self._is_closed = False
        self._writing_since_s: float | None = None
        self._owed: deque[Callable[[], int]] = deque(maxlen=TIER_OWED_MAX)
        self._pay_at_s = 0.0

    @property
    def is_available(self) -> bool:
        """Whether it is worth asking: it is not left alone now, and no write hangs."""
        with self._guard:
            since_s = self._writing_since_s
            hangs = since_s is not None and self._clock() - since_s > self._deadline_s
            return self._breaker.would_admit(self._clock()) and not hangs

    def begin(self, request: Callable[[], Answer], *, insists: bool = False) -> Call[Answer] | None:
        """Have a thread make a call; None if the tier is left alone, or all its threads are taken.

        insists: not to be left out; None only once this is closed, or where no thread can be had.
        """
        call: Call[Answer] = Call(request)
        with self._guard:
            if self._is_closed:  # no thread would take it
                return None
            is_taken = self._busy >= 2 * TIER_READERS
            if not self._has_thread() or not (
                insists or (not is_taken and self._breaker.admits(self._clock()))
            ):
                self._counters.add(tier_skipped_calls=0 if insists else 1)
                return None
            self._busy += 1
        call.when_over(self._one_less)
        self._waiting.put(call)  # type: ignore[arg-type]
        return call

    def finish(self, call: Call[Answer] | None, otherwise: Answer, deadline_s: float) -> Answer:
        """The answer of a call, or `otherwise`; returns by the deadline (of the injected clock)."""
        if call is None:
            return otherwise
        try:
            is_over = call.wait(deadline_s - self._clock())
        except BaseException:  # whoever waited was interrupted: the breaker has to hear of an end
            self._settle(None, late=True)
            raise
        if not is_over:
            self._settle(None, late=True)
            return otherwise
        self._settle(call.error, late=False)
        return otherwise if call.error is not None or call.answer is None else call.answer

    def deadline_s(self) -> float:
        """The deadline of a call that begins now."""
        return self._clock() + self._deadline_s

    def ask(self, request: Callable[[], Answer], otherwise: Answer) -> Answer:
        """`begin` and `finish`."""
        deadline_s = self.deadline_s()
        return self.finish(self.begin(request), otherwise, deadline_s)

    def insist(self, request: Callable[[], int]) -> None:
        """As `ask`, but the call is made in any case, and made again when the tier answers others, until it
        does not raise; TIER_OWED_MAX are kept for that.
        """
        deadline_s = self.deadline_s()
        self.finish(self._insisted(request), 0, deadline_s)

    def _insisted(self, request: Callable[[], int]) -> Call[int]:
        call = self.begin(request, insists=True)
        if call is None:  # there are no threads for it
            call = Call(request)
            call.carry_out()

        def look() -> None:
            if call.error is not None:
                with self._guard:
                    self._owed.append(request)

        call.when_over(look)
        return call

    def _pay(self) -> None:
        """The tier answers: make again what it still has to do."""
        with self._guard:
            now_s = self._clock()
            if not self._owed or now_s < self._pay_at_s:
                return
            self._pay_at_s = now_s + TIER_OWED_PAUSE_S
            owed = [self._owed.popleft() for _ in range(min(len(self._owed), TIER_READERS))]
        for request in owed:
            self._insisted(request)

    def write(self, request: Callable[[], bool]) -> bool:
        """Make a write in this thread, for as long as it takes; whether it was done. For one thread only."""
        with self._guard:
            if not self._breaker.admits(self._clock()):
                return False
            self._writing_since_s = self._clock()
        call = Call(request)
        call.carry_out()
        with self._guard:
            began_s, self._writing_since_s = self._writing_since_s, None
        self._settle(call.error, late=self._clock() - (began_s or 0.0) > self._deadline_s)
        return bool(call.answer)

    def close(self) -> None:
        """End the threads that are idle; those in a call end after it. What is asked from now on misses."""
        with self._guard:
            self._is_closed = True
            for _ in range(self._threads):
                self._waiting.put(None)

    def _settle(self, error: BaseException | None, *, late: bool) -> None:
        is_fine = error is None and not late
        with self._guard:
            if is_fine:
                self._breaker.succeeded()
            else:
                self._breaker.failed(self._clock(), late=late)
        if is_fine:
            self._pay()
            return
        if late:
            self._counters.add(tier_late_calls=1)
        why = repr(error) if error is not None else f"no answer within {self._deadline_s} s"
        self._counters.failed(Cause.TIER, why, tier=self.tier.name)

    def _one_less(self) -> None:
        with self._guard:
            self._busy -= 1

    def _has_thread(self) -> bool:
        """Start one if all are taken and there may be more; whether there is any. Under the lock."""
        if self._busy >= self._threads and self._threads < TIER_READERS:
            thread = threading.Thread(target=self._run, name=f"vcache-{self.tier.name}", daemon=True)
            with suppress(RuntimeError):  # the process may have no more: then the others have to do
                thread.start()
                self._threads += 1
        return self._threads > 0

    def _run(self) -> None:
        use_all_cores()
        while True:
            call = self._waiting.get()
            if call is None:
                return
            call.carry_out()
            del call
