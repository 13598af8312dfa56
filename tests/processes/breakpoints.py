"""Places inside an engine's copy at which its process stops itself, or lingers, in the midst of real work.

A signal from outside lands anywhere. Here the process raises SIGSTOP against itself exactly there, and the
test goes on when it has stopped.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import vcache.engine.retrieve
import vcache.engine.store

Where = Literal["before", "amid", "after"]

_COPIES: dict[str, ModuleType] = {"gather": vcache.engine.store, "scatter": vcache.engine.retrieve}
_real: dict[str, Callable[..., None]] = {name: getattr(module, name) for name, module in _COPIES.items()}


def stop_at(copy: str, where: Where) -> None:
    """The next `copy` ("gather", "scatter") stops the process before it, amid its chunks, or after it."""

    def stopping(transfer: Any, chunks: Any, counters: Any) -> None:
        restore(copy)
        first = {"before": 0, "amid": len(chunks) // 2, "after": len(chunks)}[where]
        if first:
            _real[copy](transfer.part(0, first), chunks[:first], counters)
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        if first < len(chunks):
            _real[copy](transfer.part(first), chunks[first:], counters)

    setattr(_COPIES[copy], copy, stopping)


def linger_at(copy: str, up_to_s: float) -> None:
    """Every `copy` waits before it, or between its chunks, for a random time."""
    never = threading.Event()

    def lingering(transfer: Any, chunks: Any, counters: Any) -> None:
        first = random.randrange(len(chunks))
        if first:
            _real[copy](transfer.part(0, first), chunks[:first], counters)
        never.wait(random.uniform(0, up_to_s))
        _real[copy](transfer.part(first), chunks[first:], counters)

    setattr(_COPIES[copy], copy, lingering)


def restore(copy: str) -> None:
    """The copy as it is."""
    setattr(_COPIES[copy], copy, _real[copy])
