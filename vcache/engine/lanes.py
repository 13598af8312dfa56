"""Where copies run, and what they run after: streams and events of a GPU, or simply here and now on a CPU.

A copy is ordered after all that the caller had queued when it called, and what the caller queues once a call
has returned finds the copy finished. In between nothing waits for the compute of the engine, nor the other
way round.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, Protocol

import torch

from vcache.kernels.capture import undisturbed_capture


class Event(Protocol):
    """Something that happens once."""

    def wait(self) -> None:
        """Return when it has happened. Other threads run meanwhile. Raises what the device raises."""
        ...

    def hold_caller(self) -> None:
        """Have all that the calling thread queues on its current stream from now on run after it."""
        ...


class Lane(Protocol):
    """An order of copies, beside the engine's own streams. Thread-safe."""

    def caller(self) -> Event:
        """The event that all has run which the calling thread has queued so far on its current stream."""
        ...

    def run(self, copy: Callable[[], object], after: Event) -> Event:
        """Queue what `copy` launches behind the copies of before and behind `after`; the event of its end.

        When it raises, nothing of it runs any more.
        """
        ...


class _Past:
    """An event that has happened."""

    def wait(self) -> None:
        return

    def hold_caller(self) -> None:
        return


PAST: Final[Event] = _Past()


class HostLane:
    """Copies by the calling thread: done at the return."""

    def caller(self) -> Event:
        """Nothing that this thread has done is still to come."""
        return PAST

    def run(self, copy: Callable[[], object], after: Event) -> Event:
        """Copy now."""
        after.wait()
        copy()
        return PAST


class _StreamEvent:
    """An event on a GPU's stream."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self.event = event
        self._device = device

    def wait(self) -> None:
        # It spins, without the GIL: a copy takes microseconds to a few milliseconds, and to be put to sleep
        # and woken takes tens of microseconds.
        with undisturbed_capture():
            self.event.synchronize()

    def hold_caller(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self.event)


class StreamLane:
    """A stream of its own on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._guard = threading.Lock()
        with undisturbed_capture():
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def caller(self) -> Event:
        """An event on the current stream."""
        return self._recorded(torch.cuda.current_stream(self._device))

    def run(self, copy: Callable[[], object], after: Event) -> Event:
        """Launch on the stream. Does not wait for the GPU."""
        with (
            self._guard,
            undisturbed_capture(),
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
        ):
            after.hold_caller()  # the caller is, for now, this stream
            try:
                copy()
            except BaseException:
                # A part may have been launched: whoever hears of the failure gives the memory away.
                self._stream.synchronize()
                raise
            return self._recorded(self._stream)

    def _recorded(self, stream: torch.cuda.Stream) -> _StreamEvent:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with undisturbed_capture():
            event.record(stream)
        return _StreamEvent(event, self._device)


class Lanes:
    """The lanes of one direction, one for every device that it is asked for. Thread-safe.

    make: how a lane is made.
    """

    def __init__(self, make: Callable[[torch.device], Lane] | None = None) -> None:
        self._make = make or lane_on
        self._lanes: dict[torch.device, Lane] = {}
        self._guard = threading.Lock()

    def on(self, device: torch.device) -> Lane:
        """The lane of a device, made on first use."""
        lane = self._lanes.get(device)
        if lane is None:
            with self._guard:
                lane = self._lanes.get(device) or self._make(device)
                self._lanes[device] = lane
        return lane


def lane_on(device: torch.device) -> Lane:
    """A new lane for copies between paged KV on `device` and segments."""
    return StreamLane(device) if device.type == "cuda" else HostLane()
