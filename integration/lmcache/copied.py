"""Chunks that LMCache has in memory of its own, copied into memory of the pool: whole, or layer by layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from integration.lmcache.core import Core
from integration.lmcache.keys import Place
from integration.lmcache.memory import bytes_of_view, form_of_view
from vcache.engine.chunks import Draft, Part
from vcache.engine.forms import Form
from vcache.limits import PARTIAL_CHUNKS_MAX


class Copied:
    """Copies of one backend; those of which layers are still to come wait here, the oldest gives way.

    free: called with what is freed before it is complete.
    """

    def __init__(self, core: Core, layers: int, free: Callable[[Draft, int], None]) -> None:
        self._core = core
        self._layers = layers
        self._free = free
        self._guard = threading.Lock()
        self._partial: dict[bytes, Draft] = {}

    @contextmanager
    def of(self, foreign: Sequence[tuple[Place, Any]]) -> Iterator[list[Part]]:
        """Copies of those that the pool has not and has room for, to be put; freed when the block ends."""
        parts: list[Part] = []
        try:
            self._copy(foreign, parts)
            yield parts
        finally:
            for part in parts:
                if not part.draft.unput:
                    with self._guard:
                        self._partial.pop(part.key, None)
                self._core.chunks.free(part.draft, part.number)

    def close(self) -> None:
        """Free what was never completed."""
        with self._guard:
            drafts, self._partial = list(self._partial.values()), {}
        for draft in drafts:
            self._abandon(draft)

    def _copy(self, foreign: Sequence[tuple[Place, Any]], parts: list[Part]) -> None:
        chunks = self._core.chunks
        if any(
            place.layered for place, _ in foreign
        ):  # LMCache puts layers whose copies it has only launched
            self._core.device.synchronise()
        new = [place.key for place, _ in foreign if place.key not in self._partial]
        there = dict(zip(new, chunks.present(new), strict=True))
        for place, view in foreign:
            if there.get(place.key):
                continue
            draft = self._partial.get(place.key) or self._new_draft(place, view)
            if draft is None:
                continue
            source = bytes_of_view(view)
            if place.part >= draft.form.parts or source.numel() != draft.form.part_bytes:
                chunks.counters.add(unstored_chunks=1)
                continue
            parts.append(Part(draft, place.part, place.key))
            draft.part(place.part).copy_(source)

    def _new_draft(self, place: Place, view: Any) -> Draft | None:
        """Memory for the chunk that this is (the first part of); the oldest unfinished one gives way."""
        form = form_of_view(view)
        if place.layered:
            form = Form(form.shapes, form.dtypes, form.kind, self._layers or 1)
        drafts = self._core.chunks.draft(form, 1)
        if not drafts:
            return None
        if form.parts > 1:
            oldest = None
            with self._guard:
                self._partial[place.key] = drafts[0]
                if len(self._partial) > PARTIAL_CHUNKS_MAX:
                    oldest = self._partial.pop(next(iter(self._partial)))
            if oldest is not None:
                self._abandon(oldest)
        return drafts[0]

    def _abandon(self, draft: Draft) -> None:
        for part in list(draft.unfreed):
            self._free(draft, part)
