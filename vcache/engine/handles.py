"""Operations under way: handles, the threads that carry them out, and the gate that `close` shuts."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeAlias, TypeVar

from vcache.errors import EngineClosed, ForkedProcess
from vcache.limits import ASYNC_OPERATIONS_MAX, ASYNC_THREADS, ENGINE_CLOSE_WAIT_S
from vcache.logs import Line

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Handle(Generic[Result]):
    """One operation under way. Its pages are borrowed until it is done: leave them alone before."""

    def __init__(self, future: Future[Result]) -> None:
        self.future = future
        self._pid = os.getpid()

    def done(self) -> bool:
        """Whether the copy has really finished (or failed); never blocks."""
        return self.future.done()

    def result(self, timeout_s: float | None = None) -> Result:
        """Wait until it is done, return what the blocking call returns; TimeoutError after `timeout_s`.

        A timeout ends the waiting and nothing else: the copy goes on. Raises what the operation raised, if it
        did, and ForkedProcess in a child that fork() made, where it would never be done.
        """
        self.check_process()
        try:
            return self.future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            if self.future.done():
                raise  # the operation's own
            raise TimeoutError(f"not done after {timeout_s} s") from None

    def check_process(self) -> None:
        """Raise ForkedProcess in a child that fork() made."""
        if os.getpid() != self._pid:
            raise ForkedProcess(f"this operation runs in process {self._pid}, and was begun before fork()")


StoreHandle: TypeAlias = Handle[int]
"""A store under way; its result is how many of its chunks the pool has now."""


class Operations:
    """At most ASYNC_OPERATIONS_MAX operations, carried out by a few threads (copies release the GIL)."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(ASYNC_THREADS, thread_name_prefix="vcache-copy")
        self._free = threading.Semaphore(ASYNC_OPERATIONS_MAX)

    def submit(self, operation: Callable[[], Result]) -> Handle[Result] | None:
        """Have `operation` carried out by another thread.

        None, and nothing done now or later, if too many are or if there is no thread to be had.
        """
        if not self._free.acquire(blocking=False):
            return None
        future: Future[Result] = Future()
        future.add_done_callback(lambda _: self._free.release())
        try:
            self._threads.submit(_carry_out, operation, future)
        except RuntimeError as error:
            # It is in the executor's queue all the same: unless it runs already, it must never run.
            if future.cancel():
                _log.warning(Line("no thread can be started", error=str(error)))
                return None
        return Handle(future)

    def close(self) -> None:
        """Wait for all that are under way, and take no more."""
        self._threads.shutdown(wait=True)


def _carry_out(operation: Callable[[], Result], future: Future[Result]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(operation())
    except BaseException as error:
        future.set_exception(error)


def finished(result: Result) -> Handle[Result]:
    """A handle of what is done already."""
    future: Future[Result] = Future()
    future.set_result(result)
    return Handle(future)


class Gate:
    """Every call of an engine goes through it: refuses them after `close` or a fork, and counts them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pid = os.getpid()
        self._inside = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def forked(self) -> bool:
        """Whether this process is a child that fork() made of the engine's."""
        return os.getpid() != self._pid

    @contextmanager
    def call(self) -> Iterator[None]:
        """Be inside for the block. Raises EngineClosed, ForkedProcess."""
        if self.forked:  # before the lock, which another thread of the parent may have held
            raise ForkedProcess(
                f"engine {self._name!r} was made in process {self._pid}, before fork(): make one in the child"
            )
        with self._changed:
            if self._closed:
                raise EngineClosed(f"engine {self._name!r} is closed")
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def close(self) -> bool:
        """Let nobody in any more and wait, bounded, until nobody is inside; whether it was open until now.

        Memory that a copy still uses then stays mapped until it is over. An exception that a signal handler
        raised (KeyboardInterrupt) can also have kept somebody from being counted out.
        """
        with self._changed:
            was_open, self._closed = not self._closed, True
            if not self._changed.wait_for(lambda: not self._inside, ENGINE_CLOSE_WAIT_S):
                _log.warning(
                    Line("calls are still under way at close", engine=self._name, calls=self._inside)
                )
            return was_open
