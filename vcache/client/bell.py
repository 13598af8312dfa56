"""A bell that several threads listen to: each hears that it was rung since it last listened."""

from __future__ import annotations

import threading


class Bell:
    """Counts how often it was rung. Thread-safe."""

    def __init__(self) -> None:
        self._rung = 0
        self._changed = threading.Condition()

    def ring(self) -> None:
        """Have everybody look who waits, or who waits next."""
        with self._changed:
            self._rung += 1
            self._changed.notify_all()

    def wait(self, seen: int) -> int:
        """Return when it has been rung more often than `seen`; how often."""
        with self._changed:
            self._changed.wait_for(lambda: self._rung > seen)
            return self._rung
