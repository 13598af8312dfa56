"""How long something takes on a device: by events on a GPU, by the clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import torch

_HEAD_START_CYCLES: Final = 4_000_000
"""About 2 ms: in that time all launches of one measurement are queued, so that none of them is what is timed.
"""


def finish(device: torch.device) -> None:
    """Wait until all that was launched on the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_on(device: torch.device, action: Callable[[], object], repeats: int = 1) -> float:
    """Seconds that the device itself is busy with one `action`, the mean of `repeats` in a row.

    On a GPU between two events on the current stream, with all launches queued before the first one fires.
    """
    if device.type == "cpu":
        begin_s = time.perf_counter()
        for _ in range(repeats):
            action()
        return (time.perf_counter() - begin_s) / repeats
    finish(device)
    with torch.cuda.device(device):
        torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
        begin = recorded_event(timing=True)
        for _ in range(repeats):
            action()
        end = recorded_event(timing=True)
        end.synchronize()
    return seconds_between(begin, end) / repeats


def recorded_event(*, timing: bool = False, blocking: bool = False) -> torch.cuda.Event:
    """An event on the current stream. blocking: who waits for it sleeps, and lets others run."""
    event: torch.cuda.Event = torch.cuda.Event(timing, blocking)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds_between(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    """Seconds from one event that has happened to another."""
    return float(begin.elapsed_time(end)) / 1e3


def seconds_until_done(device: torch.device, action: Callable[[], object]) -> float:
    """Seconds from the call of `action` until all that it launched has finished, as a caller waits for it."""
    finish(device)
    begin_s = time.perf_counter()
    action()
    finish(device)
    return time.perf_counter() - begin_s
