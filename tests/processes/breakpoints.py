"""Places inside an engine's copy at which its process stops itself, or lingers, in the midst of real work.

A signal from outside lands anywhere. Here the process raises SIGSTOP against itself exactly there, and the
test goes on when it has stopped.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable
from typing import Any, Literal

from vcache.engine.copies import Copies

Where = Literal["before", "amid", "after"]

_real: dict[str, Callable[..., None]] = {"gather": Copies.gather, "scatter": Copies.scatter}


def stop_at(copy: str, where: Where) -> None:
    """The next `copy` ("gather", "scatter") stops the process before it, amid its chunks, or after it."""

    def stopping(copies: Copies, transfer: Any, chunks: Any) -> None:
        restore(copy)
        first = {"before": 0, "amid": len(chunks) // 2, "after": len(chunks)}[where]
        if first:
            _real[copy](copies, transfer.part(0, first), chunks[:first])
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        if first < len(chunks):
            _real[copy](copies, transfer.part(first), chunks[first:])

    setattr(Copies, copy, stopping)


def linger_at(copy: str, up_to_s: float) -> None:
    """Every `copy` waits before it, or between its chunks, for a random time."""
    never = threading.Event()

    def lingering(copies: Copies, transfer: Any, chunks: Any) -> None:
        first = random.randrange(len(chunks))
        if first:
            _real[copy](copies, transfer.part(0, first), chunks[:first])
        never.wait(random.uniform(0, up_to_s))
        _real[copy](copies, transfer.part(first), chunks[first:])

    setattr(Copies, copy, lingering)


def restore(copy: str) -> None:
    """The copy as it is."""
    setattr(Copies, copy, _real[copy])
