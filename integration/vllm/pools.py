"""Thread pools whose threads all run from the start."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Final

_START_S: Final = 60.0


def started(threads: ThreadPoolExecutor, count: int) -> ThreadPoolExecutor:
    """The pool, once its `count` threads run. Raises RuntimeError if the system has none left.

    A pool that cannot start a thread says so although the work is in its queue, and the next thread carries
    it out: a load that was given up would be written into pages that are somebody else's by then.
    """
    together = Barrier(count)
    for running in [threads.submit(partial(together.wait, _START_S)) for _ in range(count)]:
        running.result()
    return threads
