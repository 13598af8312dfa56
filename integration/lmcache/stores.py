"""Memory of the pool that LMCache writes to, and what becomes of it: a chunk under a key, or free again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

from integration.lmcache.copied import Copied
from integration.lmcache.core import Core
from integration.lmcache.engine_chunk import EngineChunk
from integration.lmcache.keys import Keys, Place
from integration.lmcache.memory import PoolMemory, PoolView
from vcache.engine.chunks import Draft, Part
from vcache.engine.forms import Form


class Stores:
    """Stores of one backend. Thread-safe.

    memory: what LMCache knows as the allocator. query: in vLLM's scheduler, which stores nothing.
    """

    def __init__(self, core: Core, keys: Keys, chunk: EngineChunk, *, query: bool) -> None:
        self._core = core
        self._keys = keys
        self._layers = chunk.layers
        self._query = query
        self.memory = PoolMemory(self._allocate)
        self._copied = Copied(core, chunk.layers, self._freed)
        self._guard = threading.Lock()
        self._incomplete: set[bytes] = set()

    def put(self, keys: Sequence[Any], views: Sequence[Any]) -> None:
        """Store; what has been written when this is called is there for others when it returns."""
        if self._query:
            return
        parts, foreign = [], []
        for place, view in zip(self._keys.places(keys), views, strict=False):
            draft = view.draft if isinstance(view, PoolView) else None
            if draft is None:
                foreign.append((place, view))
            elif self._fits(place, draft, view.part):
                parts.append(Part(draft, view.part, place.key))
        with self._copied.of(foreign) as copied:
            self._put(parts + copied)

    def is_incomplete(self, key: Any) -> bool:
        """Whether some layers of the chunk were stored and others not yet."""
        return self._keys.place(key).key in self._incomplete

    def close(self) -> None:
        """Free what was never completed."""
        self._copied.close()
        self.memory.sweep()

    def _put(self, parts: list[Part]) -> None:
        with self._guard:
            self._incomplete.update(part.key for part in parts if len(part.draft.unput) > 1)
        self._core.chunks.put(parts)
        with self._guard:
            self._incomplete.difference_update(part.key for part in parts if not part.draft.unput)

    def _fits(self, place: Place, draft: Draft, part: int) -> bool:
        """Whether the memory was allocated for what it is put as: layers in their order, or a whole chunk."""
        if (draft.form.parts > 1) == place.layered and (part == place.part or not place.layered):
            return True
        self._core.counters.add(unstored_chunks=1)
        return False

    def _allocate(self, form: Form, count: int) -> list[PoolView] | None:
        """Memory for `count` chunks, or for as many layers of one; None if the pool has no room for all."""
        if self._query:
            return None
        self.memory.sweep()
        chunks = self._core.chunks
        if self._layers and count == self._layers:
            form = Form(form.shapes, form.dtypes, form.kind, count)
            drafts = chunks.draft(form, 1) * count
        else:
            drafts = chunks.draft(form, count)
        if len(drafts) < count:
            for draft in drafts:
                chunks.free(draft, 0)
            return None
        views = []
        for at, draft in enumerate(drafts):
            part = at if draft.form.parts > 1 else 0
            ended = partial(self._freed, draft, part)
            views.append(PoolView(draft.part(part), draft.form, self.memory, ended, draft, part))
        return views

    def _freed(self, draft: Draft, part: int) -> None:
        with self._guard:
            self._incomplete.discard(draft.key)
        self._core.chunks.free(draft, part)
