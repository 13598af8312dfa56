"""Work that an event loop asks for: done in threads of ours, and no more of it at a time than is good."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from vcache.limits import READ_THREADS, READS_IN_FLIGHT_MAX

Result = TypeVar("Result")


class Reads:
    """At most READS_IN_FLIGHT_MAX calls wait or run; what comes beyond is refused at once.

    refused, peak: how many were, and how many there were at a time.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._threads = ThreadPoolExecutor(READ_THREADS, "vcache-lmcache-read")
        self.in_flight = 0
        self.peak = 0
        self.refused = 0

    async def run(self, work: Callable[[], Result], refused: Callable[[], Result]) -> Result:
        """The result of `work`, which never blocks the loop; that of `refused` where there is no room."""
        future = self.submit(work)
        return refused() if future is None else await asyncio.wrap_future(future)

    def submit(self, work: Callable[[], Result]) -> Future[Result] | None:
        """Begin; None if there is no room for it."""
        with self._guard:
            if self.in_flight >= READS_IN_FLIGHT_MAX:
                self.refused += 1
                return None
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
        try:
            future = self._threads.submit(work)
        except RuntimeError:  # closed
            self._ended(None)
            return None
        future.add_done_callback(self._ended)
        return future

    def close(self) -> None:
        """Refuse what comes, give up what waits, and wait for what runs."""
        self._threads.shutdown(cancel_futures=True)

    def _ended(self, _: object) -> None:
        with self._guard:
            self.in_flight -= 1
