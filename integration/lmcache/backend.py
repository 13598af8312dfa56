"""`VCacheStorageBackend`: VCache as a storage plugin of LMCache, in whatever position it is configured."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.storage_backend.abstract_backend import AllocatorBackendInterface, StoragePluginInterface

from integration.lmcache.engine_chunk import chunk_of
from integration.lmcache.health import offer_health_check
from integration.lmcache.joining import belong, join
from integration.lmcache.keys import Keys
from integration.lmcache.loads import Loads
from integration.lmcache.logs import log_with_lmcache
from integration.lmcache.lookups import Lookups
from integration.lmcache.memory import PoolMemory, PoolView
from integration.lmcache.misses import Failures, empty, false, none, nones, otherwise, zero
from integration.lmcache.position import HINTS, Position, position_of, primary_mistake
from integration.lmcache.stores import Stores
from vcache.logs import Line

_log = logging.getLogger("vcache.integration.lmcache")


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
        log_with_lmcache()
        self.failures = Failures()
        self.position = position_of(config, metadata, local_cpu_backend)
        if self.position is Position.PRIMARY and (mistake := primary_mistake(config)):
            _log.error(Line(mistake))
        query = self.position is Position.QUERY
        self._chunk = chunk = chunk_of(config, metadata)
        self._keys = keys = Keys(chunk.layout.fingerprint, metadata.model_name, metadata.worker_id)
        self._core = core = join(config, metadata, loop, chunk.layout, lends=not query, device=dst_device)
        self._lookups = Lookups(core, keys, chunk, query=query)
        self._stores = Stores(core, keys, chunk, query=query)
        self._memory = self._stores.memory
        hot = self.position is Position.STAGED
        self._loads = Loads(core, keys, self._memory, chunk, local_cpu_backend, hot=hot)
        belong(core, self, config, metadata, self._memory.sweep)
        offer_health_check()
        _log.info(Line("LMCache uses VCache", position=self.position.value, layout=chunk.layout.describe()))
        if hint := HINTS.get(self.position):
            _log.info(Line(hint))

    def __str__(self) -> str:
        return self.__class__.__name__

    # -- what is there

    @otherwise(false)
    def contains(self, key: Any, pin: bool = False) -> bool:
        """Whether the chunk is there; of a first layer: it stays until the last one was loaded."""
        return self._lookups.one(key, pin)

    @otherwise(zero)
    def batched_contains(self, keys: list[Any], pin: bool = False) -> int:
        """How many leading keys are there. pin: they stay until `unpin`, or in the scheduler for a while."""
        return self._lookups.prefix(keys, pin)

    @otherwise(zero)
    async def batched_async_contains(self, lookup_id: str, keys: list[Any], pin: bool = False) -> int:
        """How many leading keys are there; they are held for the load of this lookup.

        While too much is under way it is 0, so that whoever asks is answered at once.
        """
        return await self._lookups.promised_prefix(lookup_id, keys)

    @otherwise(false)
    def exists_in_put_tasks(self, key: Any) -> bool:
        """Whether some layers of the chunk were stored and others not yet. All else is stored at once."""
        return self._stores.is_incomplete(key)

    @otherwise(none)
    def touch_cache(self) -> None:
        """Nothing to do: whoever looks with a pin uses what is found, at the server."""

    @otherwise(false)
    def pin(self, key: Any) -> bool:
        """Keep a chunk where it is until `unpin`, or the end of this process; whether it is there."""
        return bool(self._lookups.prefix([key], pin=True))

    @otherwise(false)
    def unpin(self, key: Any) -> bool:
        """End one pin; whether there was one."""
        return self._lookups.unpin(key)

    # -- storing

    @otherwise(none)
    def batched_submit_put_task(
        self,
        keys: Sequence[Any],
        objs: list[Any],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[Any], None] | None = None,
    ) -> list[Future[None]] | None:
        """Store; what has been written when this is called is there for others when it returns."""
        self._stores.put(keys, objs)
        if on_complete_callback is not None and self.position is not Position.QUERY:
            for key in keys:
                self._call(on_complete_callback, key)
        return None

    @otherwise(none)
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

    # -- loading

    @otherwise(none)
    def get_blocking(self, key: Any) -> Any:
        """The chunk, the caller's to give back; None if it is not there."""
        return self._loads.one(key)

    @otherwise(nones)
    def batched_get_blocking(self, keys: list[Any]) -> list[Any]:
        """Each chunk, the caller's to give back; None where it is not there."""
        return self._loads.each(keys)

    @otherwise(none)
    def get_non_blocking(self, key: Any, location: str | None = None) -> Future[Any] | None:
        """As `get_blocking`, later; None while too much is under way."""
        return self._core.reads.submit(lambda: self.get_blocking(key))

    @otherwise(empty)
    async def batched_get_non_blocking(
        self, lookup_id: str, keys: list[Any], transfer_spec: Any = None
    ) -> list[Any]:
        """The leading chunks that are there, the caller's to give back."""
        return await self._loads.leading(lookup_id, keys)

    @otherwise(none)
    def cancel_request(self, req_id: str) -> None:
        """Nobody loads what that lookup found."""
        self._lookups.forget(req_id)

    # -- forgetting

    @otherwise(false)
    def remove(self, key: Any, force: bool = True) -> bool:
        """Forget a chunk; whether it was there."""
        return self._core.chunks.remove(self._keys.both(key)) > 0

    @otherwise(zero)
    def batched_remove(self, keys: list[Any], force: bool = True) -> int:
        """Forget chunks; how many were there."""
        chunks = [chunk for key in keys for chunk in self._keys.both(key)]
        return self._core.chunks.remove(list(dict.fromkeys(chunks)))

    @otherwise(zero)
    def clear(self) -> int:
        """Forget all chunks of this model, all ranks'; how many tokens they were, if all were whole."""
        return self._core.chunks.clear() * self._chunk.tokens

    # -- the allocator

    @otherwise(none)
    def allocate(
        self,
        shapes: Any,
        dtypes: Any,
        fmt: MemoryFormat | None = None,
        eviction: bool = True,
        busy_loop: bool = True,
    ) -> PoolView | None:
        """Memory of the pool to write a chunk to; None if it has no room. The server evicts, nobody waits."""
        return self._memory.allocate(shapes, dtypes, fmt or self._chunk.usual_format)

    @otherwise(none)
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
        return self._memory.batched_allocate(shapes, dtypes, batch_size, fmt or self._chunk.usual_format)

    @otherwise(lambda _: 2)
    def calculate_chunk_budget(self) -> int:
        """How many whole chunks the pool has room for."""
        return max(2, self._core.chunks.capacity_bytes() // self._chunk.nbytes)

    def get_allocator_backend(self) -> Any:
        """Who allocates what is stored here: in primary position we, else LMCache's CPU backend."""
        return self if self.local_cpu_backend is None else self.local_cpu_backend

    def get_memory_allocator(self) -> PoolMemory:
        """The allocator of our memory."""
        return self._memory

    def initialize_allocator(self, config: Any, metadata: Any) -> PoolMemory:
        """The same: it is there from the beginning."""
        return self._memory

    # -- the rest

    @otherwise(lambda _: {})
    def get_stats(self) -> dict[str, int | float | str]:
        """What happened so far, and what there is now."""
        self._memory.sweep()
        return {
            **self._core.stats(),
            "position": self.position.value,
            "failures": self.failures.count,
        }

    @property
    def healthy(self) -> bool:
        """Whether the metadata server answers."""
        return not self._core.closed and self._core.client.connected

    @otherwise(none)
    def close(self) -> None:
        """Leave the pool. Where another backend has taken this one's place, it is that one's to do."""
        if self._core.owner is self:
            self._stores.close()
            self._core.close()

    def _call(self, callback: Callable[[Any], None], key: Any) -> None:
        try:
            callback(key)
        except Exception as error:
            self.failures.note("on_complete_callback", error)
