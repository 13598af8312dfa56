"""What is there, and what stays there: by key (pins), or by the lookup that found it (promises)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from integration.lmcache.core import Core
from integration.lmcache.engine_chunk import EngineChunk
from integration.lmcache.keys import Keys
from vcache.engine.holds import Hold


class Lookups:
    """Lookups of one backend. Thread-safe.

    query: in vLLM's scheduler, where nobody unpins: what is found with a pin is kept for the time of a lease.
    """

    def __init__(self, core: Core, keys: Keys, chunk: EngineChunk, *, query: bool) -> None:
        self._core = core
        self._keys = keys
        self._chunk = chunk
        self._query = query

    def one(self, key: Any, pin: bool) -> bool:
        """Whether the chunk is there.

        Layer by layer LMCache goes on to load what this said of a chunk's first layer, and takes what it then
        gets for granted: so the chunk is held from here on, as a promise.
        """
        if pin or self._chunk.layers == 0 or self._query:
            return bool(self.prefix([key], pin))
        place = self._keys.place(key)
        if self._core.promises.full:
            return False
        holds = self._core.chunks.take_prefix([place.key], self._chunk.nbytes)
        if holds:
            self._promise(place.key, holds)
        return bool(holds)

    def prefix(self, keys: Sequence[Any], pin: bool) -> int:
        """How many leading keys are there; pin: they stay."""
        chunks = [place.key for place in self._keys.places(keys)]
        if self._query:
            return self._core.chunks.lease(chunks) if pin else self._core.chunks.count(chunks)
        if not pin:
            return self._core.chunks.count(chunks)
        holds = self._core.chunks.take_prefix(chunks, self._chunk.nbytes)
        self._core.pins.add(holds)
        return len(holds)

    async def promised_prefix(self, lookup_id: str, keys: Sequence[Any]) -> int:
        """How many leading keys are there; they are held for the load of this lookup.

        While too much is under way it is 0, so that whoever asks is answered at once.
        """
        chunks = [place.key for place in self._keys.places(keys)]

        def look() -> int:
            if self._query:
                return self._core.chunks.count(chunks)
            if self._core.promises.full:
                return 0
            holds = self._core.chunks.take_prefix(chunks, self._chunk.nbytes)
            if holds:
                self._promise(lookup_id, holds)
            return len(holds)

        return await self._core.reads.run(look, lambda: 0)

    def unpin(self, key: Any) -> bool:
        """End one pin; whether there was one."""
        hold = self._core.pins.take(self._keys.place(key).key)
        if hold is not None:
            self._core.chunks.drop(hold)
        return hold is not None

    def forget(self, lookup_id: str) -> None:
        """Nobody loads what that lookup found."""
        self._core.chunks.drop_all(self._core.promises.take(lookup_id))

    def _promise(self, name: str | bytes, holds: list[Hold]) -> None:
        self._core.chunks.drop_all(self._core.promises.add(name, holds, time.monotonic()))
