"""Cores for our threads: engines bind each of theirs to one, and a thread inherits its maker's."""

from __future__ import annotations

import os
from contextlib import suppress

import torch


def use_all_cores() -> None:
    """Let the calling thread run on every core that this process computes on, if it has several."""
    if torch.get_num_threads() < 2:
        return
    cores: set[int] = set()
    for thread in _threads():
        try:
            cores |= os.sched_getaffinity(int(thread))
        except OSError:  # it has just ended
            continue
    if cores:
        with suppress(OSError):  # not allowed here: then it stays where it is
            os.sched_setaffinity(0, cores)


def _threads() -> list[str]:
    try:
        return os.listdir("/proc/self/task")
    except OSError:
        return []
