"""Which layers' KV is still on its way to this step: the model waits at each for its own."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence


class LayerWaits:
    """Counts, for each layer, the loads that have not brought it yet. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: Counter[str] = Counter()

    def expect(self, layers: Sequence[str]) -> None:
        """A load will bring these."""
        with self._changed:
            self._waiting.update(layers)

    def arrived(self, layers: Sequence[str]) -> None:
        """A load has brought these, or never will."""
        with self._changed:
            self._waiting.subtract(layers)
            self._changed.notify_all()

    def wait(self, layer: str) -> None:
        """Return when every load has brought this layer, or has ended."""
        if self._waiting[layer]:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting[layer] <= 0)
