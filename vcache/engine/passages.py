"""Chunks on their way from the lower tiers into the pool, and what is forgotten meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager


class Passage:
    """Some chunks on their way."""

    def __init__(self, keys: Sequence[bytes], guard: threading.Lock) -> None:
        self._keys = frozenset(keys)
        self._void: set[bytes] = set()
        self._guard = guard

    def close(self, keys: Collection[bytes] | None) -> None:
        """None of these (None: of all) may be bound any more. For `Passages`, under its guard."""
        self._void |= self._keys if keys is None else self._keys.intersection(keys)

    def is_open(self, key: bytes) -> bool:
        """Whether it is still worth reading that chunk."""
        return key not in self._void

    @contextmanager
    def ending(self) -> Iterator[frozenset[bytes]]:
        """Bind chunks in this block, one request long, and none of those that it gives: they were forgotten.

        Whoever forgets waits for its end.
        """
        with self._guard:
            yield frozenset(self._void)


class Passages:
    """Keeps what is forgotten from coming back out of a tier. Thread-safe.

    A chunk that was read in a passage is not bound if somebody here was forgetting it at any time since the
    passage was opened: it was read from a tier that was about to lose it. Who begins to forget it later finds
    it bound, and so removes it from the pool.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._open: list[Passage] = []
        self._closing: dict[object, Collection[bytes] | None] = {}

    @contextmanager
    def opened(self, keys: Sequence[bytes]) -> Iterator[Passage]:
        """Look for these chunks in tiers, read them and bind them, all in this block."""
        passage = Passage(keys, self._guard)
        with self._guard:
            for keys_closed in self._closing.values():
                passage.close(keys_closed)
            self._open.append(passage)
        try:
            yield passage
        finally:
            with self._guard:
                self._open = [each for each in self._open if each is not passage]

    @contextmanager
    def closed(self, keys: Collection[bytes] | None) -> Iterator[None]:
        """Forget chunks (None: all) in this block, in the pool and in the tiers."""
        closing = object()
        with self._guard:
            for passage in self._open:
                passage.close(keys)
            self._closing[closing] = keys
        try:
            yield
        finally:
            with self._guard:
                del self._closing[closing]
