"""Cores for our threads: engines bind each of theirs to one, and a thread inherits its maker's."""

from __future__ import annotations

import os

import torch


def use_all_cores() -> None:
    """Let the calling thread run on every core that this process computes on, if it has several."""
    if torch.get_num_threads() < 2:
        return
    cores: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        try:
            cores |= os.sched_getaffinity(int(thread))
        except OSError:  # it has just ended
            continue
    if cores:
        os.sched_setaffinity(0, cores)
