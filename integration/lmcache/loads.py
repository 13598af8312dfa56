"""Chunks of the pool as LMCache loads them: views of them in place, or copies in memory of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from integration.lmcache.core import Core
from integration.lmcache.engine_chunk import EngineChunk
from integration.lmcache.keys import Keys, Place
from integration.lmcache.memory import PoolMemory, PoolView, bytes_of_view
from vcache.engine.forms import Form
from vcache.engine.holds import Hold
from vcache.logs import Line

_log = logging.getLogger("vcache.integration.lmcache")

_LAYERWISE_LOOKUP = "fake_lookup_id"
"""What LMCache calls the lookup behind every layer-wise load."""


class Loads:
    """Loads of one backend. Thread-safe.

    cpu_backend: LMCache's own CPU backend, if there is one. hot: whether it is set up with a hot cache.
    """

    def __init__(
        self,
        core: Core,
        keys: Keys,
        memory: PoolMemory,
        chunk: EngineChunk,
        cpu_backend: Any,
        *,
        hot: bool,
    ) -> None:
        self._core = core
        self._keys = keys
        self._memory = memory
        self._chunk = chunk
        self._cpu_backend = cpu_backend
        self._hot = hot

    def one(self, key: Any) -> Any:
        """The chunk, the caller's to give back; None if it is not there."""
        # LMCache puts what this returns into its hot cache, whether that is on or not.
        return self._views([key], staged=self._cpu_backend is not None)[0]

    def each(self, keys: Sequence[Any]) -> list[Any]:
        """Each chunk, the caller's to give back; None where it is not there."""
        return self._views(keys, staged=self._is_hot())

    async def leading(self, lookup_id: str, keys: Sequence[Any]) -> list[Any]:
        """The leading chunks that are there, the caller's to give back; none while too much is under way."""
        if lookup_id == _LAYERWISE_LOOKUP:  # what was promised is loaded, however much is under way
            return await asyncio.to_thread(self._layer, keys)

        def load() -> list[Any]:
            promised = self._core.promises.take(lookup_id)
            try:
                return _leading(self._views(keys, staged=self._is_hot()))
            finally:
                self._core.chunks.drop_all(promised)

        def refused() -> list[Any]:
            self._core.chunks.drop_all(self._core.promises.take(lookup_id))
            return []

        return await self._core.reads.run(load, refused)

    def _layer(self, keys: Sequence[Any]) -> list[Any]:
        """One layer of chunks that were promised; with the last one the promise is kept."""
        views = _leading(self._views(keys, staged=self._is_hot(), pinned=True))
        if len(views) < len(keys):
            _log.error(Line("layers of chunks that were there are gone", wanted=len(keys), got=len(views)))
        for place in self._keys.places(keys):
            if place.part == self._chunk.layers - 1:
                self._core.chunks.drop_all(self._core.promises.take(place.key))
        return views

    def _views(self, keys: Sequence[Any], *, staged: bool, pinned: bool = False) -> list[Any]:
        """Of each key its view, None where there is none."""
        places = self._keys.places(keys)
        holds = self._core.chunks.take([place.key for place in places], self._chunk.nbytes)
        there = [hold for hold in holds if hold is not None]
        forms = iter(self._core.chunks.forms(there))
        views: list[Any] = []
        try:
            for place, hold in zip(places, holds, strict=True):
                view = None if hold is None else self._view(place, hold, next(forms))
                if view is not None and staged:
                    view = self._staged(view)
                if view is not None and pinned:
                    view.pin()
                views.append(view)
        except BaseException:
            _give_back(views)
            self._core.chunks.drop_all(holds[len(views) + 1 :])
            raise
        return views

    def _view(self, place: Place, hold: Hold, form: Form | None) -> PoolView | None:
        """A view that holds the chunk; None, and the hold dropped, if the chunk is not what the key means."""
        if form is None or place.part >= form.parts or place.layered != (form.parts > 1):
            self._core.chunks.drop(hold)
            return None
        drop = partial(self._core.chunks.drop, hold)
        # Of layers LMCache lets go when it has launched their copies; of whole chunks when those are over.
        ended = partial(self._core.device.after, drop) if place.layered else drop
        return PoolView(form.part(hold.chunk, place.part), form, self._memory, ended)

    def _staged(self, view: PoolView) -> Any:
        """A copy in memory of LMCache's CPU allocator; None if that has no room now."""
        try:
            copy = self._cpu_backend.allocate(
                view.get_shapes(), view.get_dtypes(), view.get_memory_format(), eviction=True, busy_loop=False
            )
            if copy is not None:
                bytes_of_view(copy).copy_(bytes_of_view(view))
            return copy
        finally:
            view.ref_count_down()

    def _is_hot(self) -> bool:
        """Whether LMCache would put what it gets into its hot cache; that can be switched while it runs."""
        if self._cpu_backend is None:
            return False
        return self._hot or bool(getattr(self._cpu_backend, "use_hot", True))


def _leading(views: list[Any]) -> list[Any]:
    """Those before the first that is None; the others are given back."""
    leading = views.index(None) if None in views else len(views)
    _give_back(views[leading:])
    return views[:leading]


def _give_back(views: list[Any]) -> None:
    for view in views:
        if view is not None:
            while view.is_pinned:
                view.unpin()
            view.ref_count_down()
