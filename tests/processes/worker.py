"""A process with an engine (or a bare client), told through a pipe what to do; it can be stopped and killed.

Parent side: `Worker`. Child side: `_Child`, whose public methods are what `Worker.call` names.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.processes.devices import GPUS, device_of, tensors_on

DEADLINE_S = 60.0
"""Longer than anything takes here, even on a machine that is busy with something else."""

_POLL_S = 0.005


def eventually(predicate: Callable[[], object], what: str, within_s: float = DEADLINE_S) -> None:
    """Wait until `predicate()` holds. AssertionError, which says that `what` was not, after `within_s`."""
    never = threading.Event()
    deadline_s = time.monotonic() + within_s
    while not predicate():
        assert time.monotonic() < deadline_s, f"not within {within_s} s: {what}"
        never.wait(_POLL_S)


class _Child:
    """What a worker can be told. Everything returned is checked bytes or plain numbers."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.client: Any = None
        self.device = "cpu"
        self.kept: dict[str, Any] = {}

    def open_engine(self, *, pages: bool = False, large: bool = False, **config: Any) -> None:
        """An engine on the test layout, in its tokens form (large: of large chunks) or in its pages form."""
        from tests.processes.content import AXES, LARGE_LAYOUT, LAYOUT, PAGES_AXES, PAGES_LAYOUT
        from vcache import VCacheEngine

        self.use(config["device"])
        layout, axes = (PAGES_LAYOUT, PAGES_AXES) if pages else (LARGE_LAYOUT if large else LAYOUT, AXES)
        self.engine = VCacheEngine(layout=layout, model="test-model", kv_axes=axes, **config)
        self._warm_up(axes)

    def use(self, device: str) -> None:
        """Have the pages on the same device as the engine's segment."""
        self.device = tensors_on(device)

    def _warm_up(self, axes: str) -> None:
        """Have all that a first copy would wait for, so that calls take no longer than the tests say."""
        from tests.processes.content import PagedPrompt
        from vcache.kernels import PagedKV, prepare

        layout = self.engine.layout
        paged = PagedPrompt(1, layout.chunk_tokens, layout, device=self.device)
        prepare(PagedKV.from_tensors(paged.kvcaches, axes, layout))

    def open_client(self, **config: Any) -> bool:
        """A bare client; whether it is connected."""
        from vcache.client import Client
        from vcache.config import load

        self.client = Client(load(**config).config, name="test-client")
        return bool(self.client.wait_connected(DEADLINE_S))

    def store(self, seed: int, count: int) -> None:
        """Store a prompt of `count` tokens."""
        from tests.processes.content import prompt

        self.store_tokens(prompt(seed, count))

    def retrieve(self, seed: int, count: int) -> tuple[int, int]:
        """Retrieve a prompt: (tokens hit, tokens among them with wrong bytes)."""
        from tests.processes.content import prompt

        return self.retrieve_tokens(prompt(seed, count))

    def store_tokens(self, tokens: list[int]) -> None:
        """Store these tokens, by the call that the layout's form wants."""
        from tests.processes.content import PagedTokens

        paged = PagedTokens(tokens, self.engine.layout, device=self.device).fill()
        if self.engine.layout.form == "pages":
            self.engine.store_pages(paged.keys, kvcaches=paged.kvcaches, pages=paged.pages)
        else:
            self.engine.store(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)

    def retrieve_tokens(self, tokens: list[int]) -> tuple[int, int]:
        """Retrieve these tokens: (how many were hit, how many of those have wrong bytes)."""
        import torch

        from tests.processes.content import PagedTokens

        paged = PagedTokens(tokens, self.engine.layout, device=self.device)
        if self.engine.layout.form == "pages":
            chunks = self.engine.retrieve_pages(paged.keys, kvcaches=paged.kvcaches, pages=paged.pages)
            mask = torch.arange(len(tokens)) < chunks * self.engine.layout.chunk_tokens
        else:
            mask = self.engine.retrieve(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
        return int(mask.sum()), paged.wrong_tokens(mask)

    def mapped_devices(self) -> list[str]:
        """The devices of the peers' segments that are mapped here now."""
        from vcache.segment import MappedSegment

        found = (each for each in gc.get_objects() if issubclass(type(each), MappedSegment))
        return [mapped.device for mapped in found if not mapped.gone]

    def stop_at(self, copy: str, where: Any) -> None:
        """Have the next copy ("gather", "scatter") stop this process "before", "amid" or "after" it."""
        from tests.processes import breakpoints

        breakpoints.stop_at(copy, where)

    def lookup(self, seed: int, count: int) -> int:
        """The prefix hit of a prompt, in tokens."""
        from tests.processes.content import prompt

        return int(self.engine.lookup(prompt(seed, count)))

    def stats(self) -> dict[str, Any]:
        """The engine's statistics."""
        return dict(self.engine.get_stats())

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a module-level function of the test with this child and `arguments`."""
        return function(self, *arguments)

    def close(self) -> None:
        """Close engine and client."""
        for each in (self.engine, self.client):
            if each is not None:
                each.close()


def _serve(pipe: Connection) -> None:
    child = _Child()
    while True:
        try:
            name, arguments, keywords = pipe.recv()
        except EOFError:
            os._exit(0)  # the test is over, however it ended
        try:
            pipe.send((True, getattr(child, name)(*arguments, **keywords)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Worker:
    """A child process, forked from one that has imported what is needed and done nothing: 20 ms, not 2 s."""

    def __init__(self) -> None:
        multiprocessing.set_forkserver_preload(["vcache.engine", "tests.processes.content"])
        context = multiprocessing.get_context("forkserver")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.process.pid is not None
        return self.process.pid

    def send(self, name: str, *arguments: Any, **keywords: Any) -> None:
        """Tell it to do something; `result` waits for it."""
        self._pipe.send((name, arguments, keywords))

    def result(self, deadline_s: float = DEADLINE_S) -> Any:
        """What the earliest `send` not waited for came to. Raises AssertionError if it failed there."""
        assert self._pipe.poll(deadline_s), f"worker {self.pid} did not answer within {deadline_s} s"
        done, value = self._pipe.recv()
        assert done, value
        return value

    def call(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        """`send` and `result`."""
        self.send(name, *arguments, **keywords)
        return self.result()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def stop(self) -> None:
        """SIGSTOP, and wait until all its threads have stopped."""
        self.signal(signal.SIGSTOP)
        self.wait_stopped()

    def wait_stopped(self) -> None:
        """Wait until all its threads have stopped (it may stop itself: `stop_at`)."""
        eventually(lambda: all_stopped(self.pid), f"worker {self.pid} stops")

    def wake(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def has_memory_of(self, device: str) -> bool:
        """Whether it has the memory of a segment of this device mapped, or its descriptor open.

        What is mapped of a GPU no other process sees: there the worker is asked, who must be neither busy nor
        stopped.
        """
        if GPUS:
            from vcache.segment import device_label

            return device_label(device_of(device)) in self.call("mapped_devices")
        links = [os.path.realpath(fd) for fd in Path(f"/proc/{self.pid}/fd").iterdir()]
        return f"memfd:vcache-{device} " in Path(f"/proc/{self.pid}/maps").read_text() + "\n".join(links)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self.process.is_alive():
            self.signal(signal.SIGKILL)
        self.process.join(DEADLINE_S)
        assert not self.process.is_alive()

    def end(self) -> None:
        """Close what it has open, then end it."""
        self.call("close")
        self._pipe.close()
        self.process.join(DEADLINE_S)
        assert not self.process.is_alive()


def all_stopped(pid: int) -> bool:
    """Whether all threads of a process are stopped."""
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    return all(path.read_text().rpartition(")")[2].split()[0] == "T" for path in threads)
