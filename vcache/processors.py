"""Whether a processor has nothing to do: a thread that helps pays only then."""

from __future__ import annotations

import os
from functools import cache


@cache
def _load() -> int:
    """A descriptor that this process keeps: to open one takes four times as long as to read it."""
    return os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)


def idle_processors(count: int | None = None) -> int:
    """How many of the processors that this process may use are idle; negative: so many threads wait for one.

    count: of them all; None: as the kernel says. Where the kernel does not say what runs, none is idle; what
    runs on a host beside this machine's share of it counts as here.
    """
    try:
        running = int(os.pread(_load(), 64, 0).split()[3].partition(b"/")[0])
    except (OSError, ValueError, IndexError):
        return -1
    if running < 1:  # whoever asks runs: this kernel does not count
        return -1
    return (len(os.sched_getaffinity(0)) if count is None else count) - running
