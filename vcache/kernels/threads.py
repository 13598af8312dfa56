"""`spread`: one small pool of threads per process for copies that release the GIL.

Plain threads and not torch's own (OpenMP): where another process takes a core away, OpenMP's threads wait
for each other in a busy loop after every operator, and hundreds of short copies then take seconds.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from vcache.kernels.affinity import use_all_cores
from vcache.processors import idle_processors

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_threads = 0


def _forget() -> None:
    """A forked child has the pool's state but none of its threads."""
    global _lock, _pool, _pool_threads
    _lock, _pool, _pool_threads = threading.Lock(), None, 0


os.register_at_fork(after_in_child=_forget)


def _help(work: Callable[[], None], helpers: int) -> None:
    """Have up to `helpers` threads call `work`. A pool that is too small ends its work and is replaced."""
    global _pool, _pool_threads
    with _lock:
        if _pool is None or _pool_threads < helpers:
            if _pool is not None:
                _pool.shutdown(wait=False)
            # Whoever asks may be bound to one core: there a helper would only stand in its way.
            _pool, _pool_threads = ThreadPoolExecutor(helpers, "vcache-copy", use_all_cores), helpers
        for _ in range(helpers):
            # The interpreter is ending, or the system has no more threads: the caller does without.
            with suppress(RuntimeError):
                _pool.submit(work)


class _Tasks:
    """Tasks handed out one by one to whoever is free, until all are done or one failed."""

    def __init__(self, task: Callable[[int], None], tasks: int) -> None:
        self.task = task
        self.tasks = tasks
        self.next = 0
        self.running = 0
        self.failure: BaseException | None = None
        self.changed = threading.Condition(threading.Lock())

    def work(self, helping: bool = True) -> None:
        """Do tasks while there are any. Only helpers' tasks count as running: the caller knows of its own."""
        while True:
            with self.changed:
                if self.next >= self.tasks or self.failure is not None:
                    return
                number = self.next
                self.next += 1
                self.running += helping
            failure: BaseException | None = None
            try:
                self.task(number)
            except BaseException as error:
                failure = error
            with self.changed:
                self.running -= helping
                self.failure = self.failure or failure
                self.changed.notify_all()

    def wait(self) -> None:
        """Return when no task runs; an interrupt ends the handing out, but not the waiting."""
        while True:
            try:
                with self.changed:
                    self.changed.wait_for(lambda: not self.running)
                    return
            except BaseException as error:
                self.failure = self.failure or error


def threads_for(nbytes: int, least: int) -> int:
    """How many threads are to copy so many bytes, each at least `least`; 0 for what is less than that.

    Of as many as torch uses; where no processor of the machine is idle, of one less: an engine's threads that
    wait for their next work in a busy loop are on all of them, and of two the helper only takes turns with
    one.
    """
    most = torch.get_num_threads()
    wanted = nbytes // least
    if wanted >= most > 1 and idle_processors(max(most, os.cpu_count() or 1)) <= 0:
        return most - 1
    return min(most, wanted)


def spread(task: Callable[[int], None], tasks: int, threads: int) -> None:
    """Call `task(0)` … `task(tasks - 1)`, each once, on up to `threads` threads, the caller's among them.

    Returns when all are done; raises what the first failing one raised, after which no further ones begin.
    Either way no task runs any more, for they use the caller's memory. A helper that comes late finds nothing
    to do.
    """
    if min(threads, tasks) <= 1:
        for number in range(tasks):
            task(number)
        return
    work = _Tasks(task, tasks)
    _help(work.work, min(threads, tasks) - 1)
    try:
        work.work(helping=False)
    except BaseException as error:  # an interrupt between two tasks
        work.failure = work.failure or error
    work.wait()
    if work.failure is not None:
        raise work.failure
