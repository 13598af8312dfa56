"""Loading layer by layer: a model may start on layer 0 while later layers still arrive."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import TypeVar

from vcache.engine.handles import Handle
from vcache.engine.lanes import PAST, Event
from vcache.errors import ArgumentError

Result = TypeVar("Result")
Kept = TypeVar("Kept")


class Progress:
    """How far one retrieve has come; around it, a context manager. Thread-safe.

    ranges: the layers, in order, of which each range has an event of its own.
    """

    def __init__(self, num_layers: int, layers_per_event: int) -> None:
        if (
            not isinstance(layers_per_event, int)
            or isinstance(layers_per_event, bool)
            or layers_per_event < 1
        ):
            raise ArgumentError("layers_per_event", repr(layers_per_event), "an int of at least 1, or None")
        self.ranges = [
            range(begin, min(begin + layers_per_event, num_layers))
            for begin in range(0, num_layers, layers_per_event)
        ]
        self._num_layers = num_layers
        self._coming: Future[int] = Future()
        self._launched: list[Future[Event]] = [Future() for _ in self.ranges]

    def promise(self, chunks: int) -> None:
        """So many leading chunks come; said before the first layer does."""
        self._coming.set_result(chunks)

    def launched(self, at: int, event: Event) -> None:
        """The copy of the range at that position is on its way; `event`: it has arrived."""
        self._launched[at].set_result(event)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing more comes: whoever waits for what did not come is told so."""
        if not self._coming.done():
            _settle(self._coming, 0, error)
        for future in self._launched:
            if not future.done():
                _settle(future, PAST, error)

    def coming(self, timeout_s: float | None) -> int:
        """Wait for the promise."""
        return _in_time(self._coming, timeout_s)

    def wait_layer(self, layer: int, timeout_s: float | None) -> None:
        """Wait until a layer's copy was launched, and hold the caller's stream until it has arrived."""
        if not 0 <= layer < self._num_layers:
            raise ArgumentError("layer", layer, f"0 … {self._num_layers - 1}")
        at = layer // len(self.ranges[0])
        _in_time(self._launched[at], timeout_s).hold_caller()


class RetrieveHandle(Handle[Result]):
    """A retrieve under way; its result is what the blocking call returns.

    With `layers_per_event` a model may use a layer's pages after `wait_layer(layer)`, for what `coming` says.
    That is read under a pin, which nothing but the loss of the server can break; `result`, which is to be
    asked in the end, says whether it did: what it does not name was computed on bytes that do not count.
    """

    def __init__(
        self, handle: Handle[Result], progress: Progress | None, of: Callable[[int], Result]
    ) -> None:
        super().__init__(handle.future)
        self._progress = progress
        self._of = of

    def coming(self, timeout_s: float | None = None) -> Result:
        """What the result will be if nothing breaks; known before the first layer arrives."""
        if self._progress is None:
            return self.result(timeout_s)
        self.check_process()
        return self._of(self._progress.coming(timeout_s))

    def wait_layer(self, layer: int, timeout_s: float | None = None) -> None:
        """Return when what the caller queues next may read a layer of the pages: it is there, or will be by
        then.

        On a GPU the caller's current stream waits for it, not the caller. Without `layers_per_event` it waits
        for everything. TimeoutError after `timeout_s`; raises what the retrieve raised.
        """
        if self._progress is None:
            self.result(timeout_s)
            return
        self.check_process()
        self._progress.wait_layer(layer, timeout_s)


def _settle(future: Future[Kept], result: Kept, error: BaseException | None) -> None:
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _in_time(future: Future[Kept], timeout_s: float | None) -> Kept:
    try:
        return future.result(timeout_s)
    except concurrent.futures.TimeoutError:
        if future.done():
            raise  # the retrieve's own
        raise TimeoutError(f"not launched after {timeout_s} s") from None
