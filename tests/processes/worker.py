"""A process with an engine (or a bare client), told through a pipe what to do; it can be stopped and killed.

Parent side: `Worker`. Child side: `_Child`, whose public methods are what `Worker.call` names.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

DEADLINE_S = 60.0
"""Longer than anything takes here, even on a machine that is busy with something else."""


class _Child:
    """What a worker can be told. Everything returned is checked bytes or plain numbers."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.client: Any = None
        self.kept: dict[str, Any] = {}

    def open_engine(self, **config: Any) -> None:
        """An engine on the test layout."""
        from tests.processes.content import AXES, LAYOUT
        from vcache import VCacheEngine

        self.engine = VCacheEngine(layout=LAYOUT, model="test-model", kv_axes=AXES, **config)

    def open_client(self, **config: Any) -> bool:
        """A bare client; whether it is connected."""
        from vcache.client import Client
        from vcache.config import load

        self.client = Client(load(**config).config, name="test-client")
        return self.client.wait_connected(DEADLINE_S)

    def store(self, seed: int, count: int) -> None:
        """Store a prompt of `count` tokens."""
        from tests.processes.content import PagedPrompt

        paged = PagedPrompt(seed, count).fill()
        self.engine.store(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)

    def retrieve(self, seed: int, count: int) -> tuple[int, int]:
        """Retrieve a prompt: (tokens hit, tokens among them with wrong bytes)."""
        from tests.processes.content import PagedPrompt

        paged = PagedPrompt(seed, count)
        mask = self.engine.retrieve(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
        return int(mask.sum()), paged.wrong_tokens(mask)

    def lookup(self, seed: int, count: int) -> int:
        """The prefix hit of a prompt, in tokens."""
        from tests.processes.content import prompt

        return int(self.engine.lookup(prompt(seed, count)))

    def stats(self) -> dict[str, Any]:
        """The engine's statistics."""
        return dict(self.engine.get_stats())

    def run(self, function: Callable[[_Child], Any]) -> Any:
        """Call a module-level function of the test with this child."""
        return function(self)

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
    """A child process, spawned."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
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
        """What the earliest `send` that was not waited for came to. Raises AssertionError if it failed there."""
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
