"""`VCacheStorageBackend`: VCache as a storage plugin of LMCache, in whatever position it is configured."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.storage_backend.abstract_backend import AllocatorBackendInterface, StoragePluginInterface

from integration.lmcache.core import Core
from integration.lmcache.hashes import Comparison, fingerprint, session_name
from integration.lmcache.keys import Keys, Place
from integration.lmcache.memory import PoolMemory, PoolView, bytes_of_view, form_of_view
from integration.lmcache.metrics import publish
from integration.lmcache.position import HINTS, Position, position_of, primary_mistake
from vcache.engine.chunks import Draft, Part
from vcache.engine.forms import Form
from vcache.engine.holds import Hold
from vcache.errors import LocalStateError
from vcache.layout import DTYPE_BYTES, KVLayout
from vcache.limits import PARTIAL_CHUNKS_MAX
from vcache.logs import Line

_log = logging.getLogger("vcache.integration.lmcache")

_LAYERWISE_LOOKUP = "fake_lookup_id"
"""What LMCache calls the lookup behind every layer-wise load."""

_cores: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Core] = weakref.WeakKeyDictionary()
"""LMCache may construct a backend a second time over the first, which it then forgets: both are one."""

Method = TypeVar("Method", bound=Callable[..., Any])


def _otherwise(answer: Callable[[Any], Any]) -> Callable[[Method], Method]:
    """Whatever goes wrong in the method is logged, and LMCache gets `answer(first argument)`."""

    def decorate(method: Method) -> Method:
        def failed(self: VCacheStorageBackend, given: tuple[Any, ...], error: Exception) -> Any:
            self._failed(method.__name__, error)
            return answer(given[0] if given else None)

        @wraps(method)
        def call(self: VCacheStorageBackend, *given: Any, **named: Any) -> Any:
            try:
                return method(self, *given, **named)
            except Exception as error:  # an exception would go up into the inference engine and end it
                return failed(self, given, error)

        @wraps(method)
        async def await_it(self: VCacheStorageBackend, *given: Any, **named: Any) -> Any:
            try:
                return await method(self, *given, **named)
            except Exception as error:
                return failed(self, given, error)

        return cast(Method, await_it if asyncio.iscoroutinefunction(method) else call)

    return decorate


def _false(_: Any) -> bool:
    return False


def _zero(_: Any) -> int:
    return 0


def _none(_: Any) -> None:
    return None


def _nothing(_: Any) -> list[Any]:
    return []


def _nones(keys: Any) -> list[None]:
    return [None] * len(keys or ())


class VCacheStorageBackend(StoragePluginInterface, AllocatorBackendInterface):
    """LMCache's storage backend over the pool. Thread-safe.

    Only the constructor raises (ConfigError, SegmentError: LMCache logs it and goes on without the backend).
    Everything else that goes wrong is a miss, or a chunk that is not stored.
    """

    def __init__(
        self,
        dst_device: str = "cpu",
        config: Any = None,
        metadata: Any = None,
        local_cpu_backend: Any = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(dst_device, config, metadata, local_cpu_backend, loop)
        self.position = position_of(config, metadata, local_cpu_backend)
        if self.position is Position.PRIMARY and (mistake := primary_mistake(config)):
            _log.error(Line(mistake))
        self._layers = int(metadata.kv_shape[0]) if config.use_layerwise else 0
        layout = _layout(config, metadata)
        self._keys = Keys(layout.fingerprint, metadata.model_name, metadata.worker_id)
        self._memory = PoolMemory(self._allocate)
        self._guard = threading.Lock()
        self._partial: dict[bytes, Draft] = {}
        self._incomplete: set[bytes] = set()
        self._failures = 0
        self._core = self._shared_core(layout)
        self._whole_bytes = self._expected_bytes()
        publish(self._core, metadata, config)
        _offer_health_check()
        _log.info(Line("LMCache uses VCache", position=self.position.value, layout=layout.describe()))
        if hint := HINTS.get(self.position):
            _log.info(Line(hint))

    def _shared_core(self, layout: KVLayout) -> Core:
        """The core of the backend that this one takes the place of, or a new one."""
        config, metadata = self.config, self.metadata
        core = _cores.get(self.loop) if self.loop is not None else None
        if core is None or core.closed:
            hashes = fingerprint(config, metadata)
            role = f"{metadata.role or 'worker'}-{metadata.worker_id}"
            core = Core(
                config.extra_config,
                layout=layout,
                model=metadata.model_name,
                name=session_name(role, metadata.model_name, hashes),
                lends=self.position is not Position.QUERY,
            )
            if self.loop is not None:
                _cores[self.loop] = core
        core.owner = self
        comparison = Comparison(core.name, config.pre_caching_hash_algorithm)

        def look_after() -> None:
            self._memory.sweep()
            if core.client.connected:
                comparison.look(core.client.stats().sessions)

        core.on_turn = look_after
        return core

    def __str__(self) -> str:
        return self.__class__.__name__

    # -- what is there

    @_otherwise(_false)
    def contains(self, key: Any, pin: bool = False) -> bool:
        """Whether the chunk is there.

        Layer by layer LMCache goes on to load what this said of a chunk's first layer, and takes what it then
        gets for granted: so the chunk is held from here on, as a promise.
        """
        if pin or self._layers == 0 or self.position is Position.QUERY:
            return bool(self.batched_contains([key], pin))
        place = self._keys.place(key)
        holds = (
            [] if self._core.promises.full else self._core.chunks.take_prefix([place.key], self._whole_bytes)
        )
        if not holds:
            return False
        self._promise(place.key, holds)
        return True

    @_otherwise(_zero)
    def batched_contains(self, keys: list[Any], pin: bool = False) -> int:
        """How many leading keys are there. pin: they stay until `unpin`, or in the scheduler for a while."""
        chunks = [place.key for place in self._keys.places(keys)]
        if self.position is Position.QUERY:
            return self._core.chunks.lease(chunks) if pin else self._core.chunks.count(chunks)
        if not pin:
            return self._core.chunks.count(chunks)
        holds = self._core.chunks.take_prefix(chunks, self._whole_bytes)
        self._core.pins.add(holds)
        return len(holds)

    @_otherwise(_zero)
    async def batched_async_contains(self, lookup_id: str, keys: list[Any], pin: bool = False) -> int:
        """How many leading keys are there; they are held for the load of this lookup.

        While too much is under way it is 0, so that whoever asks is answered at once.
        """
        chunks = [place.key for place in self._keys.places(keys)]

        def look() -> int:
            if self.position is Position.QUERY:
                return self._core.chunks.count(chunks)
            if self._core.promises.full:
                return 0
            holds = self._core.chunks.take_prefix(chunks, self._whole_bytes)
            if holds:
                self._promise(lookup_id, holds)
            return len(holds)

        return await self._core.reads.run(look, lambda: 0)

    @_otherwise(_false)
    def exists_in_put_tasks(self, key: Any) -> bool:
        """Whether some layers of the chunk were stored and others not yet. All else is stored at once."""
        return self._keys.place(key).key in self._incomplete

    @_otherwise(_none)
    def touch_cache(self) -> None:
        """Nothing to do: whoever looks with a pin uses what is found, at the server."""

    @_otherwise(_false)
    def pin(self, key: Any) -> bool:
        """Keep a chunk where it is until `unpin`, or the end of this process; whether it is there."""
        return bool(self.batched_contains([key], pin=True))

    @_otherwise(_false)
    def unpin(self, key: Any) -> bool:
        """End one pin; whether there was one."""
        hold = self._core.pins.take(self._keys.place(key).key)
        if hold is not None:
            self._core.chunks.drop(hold)
        return hold is not None

    # -- storing

    @_otherwise(_none)
    def batched_submit_put_task(
        self,
        keys: Sequence[Any],
        objs: list[Any],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[Any], None] | None = None,
    ) -> list[Future[None]] | None:
        """Store; what has been written when this is called is there for others when it returns."""
        if self.position is Position.QUERY:
            return None
        places = self._keys.places(keys)
        parts, foreign = [], []
        for place, view in zip(places, objs, strict=False):
            draft = view.draft if isinstance(view, PoolView) else None
            if draft is None:
                foreign.append((place, view))
            elif self._fits(place, draft, view.part):
                parts.append(Part(draft, view.part, place.key))
        with self._copied(foreign) as copied:
            self._put(parts + copied)
        if on_complete_callback is not None:
            for key in keys:
                self._call(on_complete_callback, key)
        return None

    @_otherwise(_none)
    async def async_batched_submit_put_task(
        self,
        keys: Sequence[Any],
        objs: list[Any],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[Any], None] | None = None,
    ) -> None:
        """As `batched_submit_put_task`, off the event loop; what finds no room is not stored."""
        for view in objs:
            view.ref_count_up()
        try:
            put = partial(self.batched_submit_put_task, keys, objs, transfer_spec, on_complete_callback)
            await self._core.reads.run(put, lambda: None)
        finally:
            for view in objs:
                view.ref_count_down()

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

    def _copied(self, foreign: list[tuple[Place, Any]]) -> _Copied:
        return _Copied(self, foreign)

    # -- loading

    @_otherwise(_none)
    def get_blocking(self, key: Any) -> Any:
        """The chunk, the caller's to give back; None if it is not there."""
        # LMCache puts what this returns into its hot cache, whether that is on or not.
        return self._views([key], staged=self.local_cpu_backend is not None)[0]

    @_otherwise(_nones)
    def batched_get_blocking(self, keys: list[Any]) -> list[Any]:
        """Each chunk, the caller's to give back; None where it is not there."""
        return self._views(keys, staged=self._hot())

    @_otherwise(_none)
    def get_non_blocking(self, key: Any, location: str | None = None) -> Future[Any] | None:
        """As `get_blocking`, later; None while too much is under way."""
        return self._core.reads.submit(lambda: self.get_blocking(key))

    @_otherwise(_nothing)
    async def batched_get_non_blocking(
        self, lookup_id: str, keys: list[Any], transfer_spec: Any = None
    ) -> list[Any]:
        """The leading chunks that are there, the caller's to give back."""
        layerwise = lookup_id == _LAYERWISE_LOOKUP

        def load() -> list[Any]:
            promised = [] if layerwise else self._core.promises.take(lookup_id)
            try:
                views = self._views(keys, staged=self._hot(), pinned=layerwise)
            finally:
                self._core.chunks.drop_all(promised)
            leading = views.index(None) if None in views else len(views)
            for view in views[leading:]:
                if view is not None:
                    _give_back(view)
            if layerwise:
                self._after_layer(keys, leading)
            return views[:leading]

        def refused() -> list[Any]:
            self._core.chunks.drop_all([] if layerwise else self._core.promises.take(lookup_id))
            return []

        if layerwise:  # what was promised is loaded, however much is under way
            return await asyncio.to_thread(load)
        return await self._core.reads.run(load, refused)

    @_otherwise(_none)
    def cancel_request(self, req_id: str) -> None:
        """Nobody loads what that lookup found."""
        self._core.chunks.drop_all(self._core.promises.take(req_id))

    def _views(self, keys: list[Any], *, staged: bool, pinned: bool = False) -> list[Any]:
        """Of each key its view, None where there is none."""
        places = self._keys.places(keys)
        holds = self._core.chunks.take([place.key for place in places], self._whole_bytes)
        there = [hold for hold in holds if hold is not None]
        forms = iter(self._core.chunks.forms(there))
        views: list[Any] = []
        for place, hold in zip(places, holds, strict=True):
            form = None if hold is None else next(forms)
            view = None if hold is None else self._view(place, hold, form)
            if view is not None and staged:
                view = self._staged(view)
            if view is not None and pinned:
                view.pin()
            views.append(view)
        return views

    def _view(self, place: Place, hold: Hold, form: Form | None) -> PoolView | None:
        """A view that holds the chunk; None, and the hold dropped, if the chunk is not what the key means."""
        if form is None or place.part >= form.parts or place.layered != (form.parts > 1):
            self._core.chunks.drop(hold)
            return None
        raw = form.part(hold.chunk, place.part)
        return PoolView(raw, form, self._memory, partial(self._core.chunks.drop, hold))

    def _staged(self, view: PoolView) -> Any:
        """A copy in memory of LMCache's CPU allocator; None if that has no room now."""
        try:
            copy = self.local_cpu_backend.allocate(
                view.get_shapes(), view.get_dtypes(), view.get_memory_format(), eviction=True, busy_loop=False
            )
            if copy is not None:
                bytes_of_view(copy).copy_(bytes_of_view(view))
            return copy
        finally:
            view.ref_count_down()

    def _hot(self) -> bool:
        """Whether LMCache would put what it gets into its hot cache; that can be switched while it runs."""
        return self.local_cpu_backend is not None and bool(
            getattr(self.local_cpu_backend, "use_hot", True) or self.position is Position.STAGED
        )

    def _after_layer(self, keys: list[Any], got: int) -> None:
        if got < len(keys):
            _log.error(Line("layers of chunks that were there are gone", wanted=len(keys), got=got))
        for place in self._keys.places(keys):
            if place.part == self._layers - 1:
                self._core.chunks.drop_all(self._core.promises.take(place.key))

    def _promise(self, name: str | bytes, holds: list[Hold]) -> None:
        self._core.chunks.drop_all(self._core.promises.add(name, holds, time.monotonic()))

    # -- forgetting

    @_otherwise(_false)
    def remove(self, key: Any, force: bool = True) -> bool:
        """Forget a chunk; whether it was there."""
        return self._core.chunks.remove(self._keys.both(key)) > 0

    @_otherwise(_zero)
    def batched_remove(self, keys: list[Any], force: bool = True) -> int:
        """Forget chunks; how many were there."""
        chunks = [chunk for key in keys for chunk in self._keys.both(key)]
        return self._core.chunks.remove(list(dict.fromkeys(chunks)))

    @_otherwise(_zero)
    def clear(self) -> int:
        """Forget all chunks of this model, all ranks'; how many tokens they were, if all were whole."""
        return self._core.chunks.clear() * int(self.config.chunk_size)

    # -- the allocator

    @_otherwise(_none)
    def allocate(
        self,
        shapes: Any,
        dtypes: Any,
        fmt: MemoryFormat | None = None,
        eviction: bool = True,
        busy_loop: bool = True,
    ) -> PoolView | None:
        """Memory of the pool to write a chunk to; None if it has no room. The server evicts, nobody waits."""
        return self._memory.allocate(shapes, dtypes, fmt or self._usual_format())

    @_otherwise(_none)
    def batched_allocate(
        self,
        shapes: Any,
        dtypes: Any,
        batch_size: int,
        fmt: MemoryFormat | None = None,
        eviction: bool = True,
        busy_loop: bool = True,
    ) -> list[PoolView] | None:
        """As `allocate`, all of `batch_size` or None; one for each layer are the layers of one chunk."""
        return self._memory.batched_allocate(shapes, dtypes, batch_size, fmt or self._usual_format())

    @_otherwise(lambda _: 2)
    def calculate_chunk_budget(self) -> int:
        """How many whole chunks the pool has room for."""
        return max(2, self._core.chunks.capacity_bytes() // self._whole_bytes)

    def get_allocator_backend(self) -> Any:
        """Who allocates what is stored here: in primary position we, else LMCache's CPU backend."""
        return self if self.local_cpu_backend is None else self.local_cpu_backend

    def get_memory_allocator(self) -> PoolMemory:
        """The allocator of our memory."""
        return self._memory

    def initialize_allocator(self, config: Any, metadata: Any) -> PoolMemory:
        """The same: it is there from the beginning."""
        return self._memory

    def _allocate(self, form: Form, count: int) -> list[PoolView] | None:
        if self.position is Position.QUERY:
            return None
        self._memory.sweep()
        core = self._core
        if self._layers and count == self._layers:
            form = Form(form.shapes, form.dtypes, form.kind, count)
            drafts = core.chunks.draft(form, 1) * count
        else:
            drafts = core.chunks.draft(form, count)
        if len(drafts) < count:
            for draft in drafts:
                core.chunks.free(draft, 0)
            return None
        views = []
        for at, draft in enumerate(drafts):
            part = at if draft.form.parts > 1 else 0
            ended = partial(self._freed, draft, part)
            views.append(PoolView(draft.part(part), draft.form, self._memory, ended, draft, part))
        return views

    def _freed(self, draft: Draft, part: int) -> None:
        with self._guard:
            self._incomplete.discard(draft.key)
        self._core.chunks.free(draft, part)

    # -- the rest

    @_otherwise(lambda _: {})
    def get_stats(self) -> dict[str, int | float | str]:
        """What happened so far, and what there is now."""
        self._memory.sweep()
        return {**self._core.stats(), "position": self.position.value, "failures": self._failures}

    @property
    def healthy(self) -> bool:
        """Whether the metadata server answers."""
        return not self._core.closed and self._core.client.connected

    @_otherwise(_none)
    def close(self) -> None:
        """Leave the pool. Where another backend has taken this one's place, it is that one's to do."""
        if self._core.owner is not self:
            return
        with self._guard:
            partial_drafts, self._partial = list(self._partial.values()), {}
        for draft in partial_drafts:
            self._abandon(draft)
        self._memory.sweep()
        self._core.close()

    def _abandon(self, draft: Draft) -> None:
        for part in list(draft.unfreed):
            self._freed(draft, part)

    def _usual_format(self) -> MemoryFormat:
        if self.metadata.use_mla:
            return MemoryFormat.KV_MLA_FMT
        if not self._layers:
            return MemoryFormat.KV_2LTD
        return MemoryFormat.KV_2TD if self.config.enable_blending else MemoryFormat.KV_T2D

    def _expected_bytes(self) -> int:
        """Bytes of a whole chunk of this engine's: what a lower tier is asked for."""
        layers, parts, _, heads, size = self.metadata.kv_shape
        dtype = str(self.metadata.kv_dtype).removeprefix("torch.")
        tokens = int(self.config.chunk_size)
        if self._layers:
            return Form(((tokens, parts, heads * size),), (dtype,), 0, layers).chunk_bytes
        return Form(((parts, layers, tokens, heads * size),), (dtype,), 0).chunk_bytes

    def _call(self, callback: Callable[[Any], None], key: Any) -> None:
        try:
            callback(key)
        except Exception as error:
            self._failed("on_complete_callback", error)

    def _failed(self, method: str, error: Exception) -> None:
        self._failures += 1
        if isinstance(error, LocalStateError):  # closed: LMCache goes on for a moment
            _log.debug(Line("after the end", method=method, error=str(error)))
        else:
            _log.error(Line("a call failed; LMCache sees a miss", method=method), exc_info=error)


class _Copied:
    """Chunks that LMCache has in memory of its own, copied into drafts; freed when the block ends."""

    def __init__(self, backend: VCacheStorageBackend, foreign: list[tuple[Place, Any]]) -> None:
        self._backend = backend
        self._foreign = foreign
        self._parts: list[Part] = []

    def __enter__(self) -> list[Part]:
        backend, chunks = self._backend, self._backend._core.chunks
        known = backend._partial
        new = [place.key for place, _ in self._foreign if place.key not in known]
        there = dict(zip(new, chunks.present(new), strict=True))
        for place, view in self._foreign:
            if there.get(place.key):
                continue
            draft = known.get(place.key) or self._new_draft(place, view)
            if draft is None:
                continue
            source = bytes_of_view(view)
            if place.part >= draft.form.parts or source.numel() != draft.form.part_bytes:
                chunks.counters.add(unstored_chunks=1)
                continue
            draft.part(place.part).copy_(source)
            self._parts.append(Part(draft, place.part, place.key))
        return self._parts

    def __exit__(self, *_: object) -> None:
        backend = self._backend
        for part in self._parts:
            if not part.draft.unput:
                with backend._guard:
                    backend._partial.pop(part.key, None)
            backend._core.chunks.free(part.draft, part.number)

    def _new_draft(self, place: Place, view: Any) -> Draft | None:
        """Memory for the chunk that this is (the first part of); the oldest unfinished one gives way."""
        backend = self._backend
        form = form_of_view(view)
        if place.layered:
            form = Form(form.shapes, form.dtypes, form.kind, backend._layers or 1)
        drafts = backend._core.chunks.draft(form, 1)
        if not drafts:
            return None
        if form.parts > 1:
            with backend._guard:
                backend._partial[place.key] = drafts[0]
                oldest = None
                if len(backend._partial) > PARTIAL_CHUNKS_MAX:
                    oldest = backend._partial.pop(next(iter(backend._partial)))
            if oldest is not None:
                backend._abandon(oldest)
        return drafts[0]


def _offer_health_check() -> None:
    """LMCache's monitor takes every check that it finds in the folders of one package: give it ours, too."""
    from lmcache.v1.health_monitor import checks

    folder = str(Path(__file__).parent / "health_checks")
    if folder not in checks.__path__:
        checks.__path__.append(folder)


def _give_back(view: Any) -> None:
    while view.is_pinned:
        view.unpin()
    view.ref_count_down()


def _layout(config: Any, metadata: Any) -> KVLayout:
    """What a chunk of this engine is, as far as it is known at once and the same in all processes."""
    layers, parts, _, heads, size = (int(number) for number in metadata.kv_shape)
    dtype = str(metadata.kv_dtype).removeprefix("torch.")
    return KVLayout(
        num_layers=layers,
        num_kv_heads=heads,
        head_size=size,
        dtype=dtype if dtype in DTYPE_BYTES else "uint8",
        chunk_tokens=int(config.chunk_size),
        kv_parts=parts,
        form="pages",
        page_tokens=int(config.chunk_size),
        page_bytes=int(config.chunk_size) * parts * heads * size * metadata.kv_dtype.itemsize,
        page_format=f"lmcache.1 {dtype}" + (" mla" if metadata.use_mla else ""),
    )
