"""`VCacheEngine`: what an inference engine calls to store KV in the pool, look it up and load it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from vcache.client import Client
from vcache.config import Config
from vcache.engine.arguments import (
    Transfer,
    check_identity,
    checked_tokens,
    loaded_config,
)
from vcache.engine.copies import Copies
from vcache.engine.handles import Gate, Operations, StoreHandle, finished
from vcache.engine.lanes import Lanes
from vcache.engine.layerwise import Progress, RetrieveHandle
from vcache.engine.lending import Lending
from vcache.engine.lookup import Location, Lookup
from vcache.engine.lower import LowerTiers
from vcache.engine.pool import Pool
from vcache.engine.retrieve import Retrieve
from vcache.engine.stats import Cause, Counters
from vcache.engine.store import Store
from vcache.engine.tier_work import TierWork
from vcache.engine.transfers import Transfers
from vcache.kernels import LaunchOptions
from vcache.keys import KeyChain, Tokens
from vcache.layout import KVLayout
from vcache.runtime import RuntimeDir
from vcache.tiers import Tier
from vcache.tiers.configured import make_tiers

Result = TypeVar("Result")
KVCaches: TypeAlias = Sequence[Tensor] | Mapping[str, Tensor] | Tensor


class VCacheEngine:
    """Stores chunks of KV in the pool and loads them from it, for one model, layout and rank. Thread-safe.

    A chunk that is not there, a pool that is full, a server that is down: all of these are misses (or
    chunks that were not stored), counted in `get_stats` and logged. What raises: ArgumentError for wrong
    arguments, EngineClosed, ForkedProcess, and what the device raises. `kvcaches` are the paged tensors,
    one per layer (a list, or a mapping in the order of the layers) or one for all. `slot_mapping` has one
    int per token, -1 where there is no slot.
    """

    def __init__(
        self,
        *,
        layout: KVLayout,
        model: str,
        kv_axes: str = "kpshd",
        rank: int = 0,
        cache_salt: str = "",
        lora: str = "",
        config: Config | None = None,
        tiers: Sequence[Tier] | None = None,
        name: str = "engine",
        **overrides: Any,
    ) -> None:
        """Connect to the pool; a server that is not there is waited for in the background, not here.

        layout: what a chunk is. model, rank, cache_salt, lora: whose chunks these are; they are part of
        every key. kv_axes: how the paged tensors' dimensions are spelled, see `vcache.kernels.axes`. tiers:
        lower tiers, the fastest first; they stay the caller's to close. None: those that the configuration
        names. config: by default `vcache.config.load(**overrides)`, where overrides are nested, as
        `segment={"size": 0}`, or dotted, as `**{"tiers.order": "rocksdb"}`. Raises ArgumentError,
        ConfigError, and SegmentError if the segment that was asked for does not fit.
        """
        check_identity(layout, model, tiers or ())
        chain = KeyChain(layout.fingerprint, model, rank, cache_salt, lora)
        config = loaded_config(config, overrides)
        loads = Lanes()
        self._transfers = Transfers(layout, chain, kv_axes, loads, partial=config.engine.store_partial_chunks)
        self._layout = layout
        self._gate = Gate(name)
        self._counters = Counters()
        self._operations = Operations()
        with ExitStack() as undo:
            self._own_tiers = make_tiers(config) if tiers is None else []
            for tier in self._own_tiers:
                undo.callback(tier.close)
            self._client = _joined(config, name, undo)
            self._pool = Pool(self._client, self._counters, layout, model, config.device)
            self._make_parts(self._own_tiers if tiers is None else tiers, config, loads, undo)
            if config.server.autostart or _session_path(config).exists():
                self._client.wait_connected(config.client.connect_timeout_ms / 1e3)
            self._left = undo.pop_all()

    def _make_parts(self, tiers: Sequence[Tier], config: Config, loads: Lanes, undo: ExitStack) -> None:
        """Make what works on the pool and the tiers; what has threads is in `undo` once it is made."""
        pool, counters = self._pool, self._counters
        deadline_s = config.tiers.deadline_ms / 1e3
        self._lower = LowerTiers(tiers, self._layout.fingerprint, counters, deadline_s=deadline_s)
        undo.callback(self._lower.close)
        self._tier_work = TierWork(
            self._client, pool, self._lower, counters, config=config, chunk_bytes=self._layout.chunk_bytes
        )
        undo.callback(self._tier_work.close)
        copies = Copies(counters, LaunchOptions(config.engine.sm_limit), loads=loads)
        prefetch = self._tier_work.prefetch
        self._lookup = Lookup(pool, self._lower, prefetch)
        self._store = Store(pool, copies, self._tier_work.stored_to, counters)
        self._retrieve = Retrieve(pool, copies, self._lower, counters, prefetch)

    def register(self, kvcaches: KVCaches) -> None:
        """Make now what the first copy of these tensors would have to make: on a GPU, compiled kernels.

        Not needed, and not to be called while a graph is captured. Raises ArgumentError for tensors that do
        not fit.
        """
        with self._gate.call():
            self._transfers.prepare(kvcaches)

    # -- the tokens form

    def lookup(self, tokens: Tokens) -> int:
        """How many tokens the longest prefix of `tokens` has that is in the pool or a lower tier."""
        with self._gate.call(), self._counters.seconds("lookup_seconds"):
            self._transfers.require_form("tokens", "lookup_pages")
            array = checked_tokens(tokens)
            count = len(array)
            # Hashing a long prompt takes longer than all else, so not where nothing can be found anyway.
            keys = self._transfers.keys(array) if self._lookup.possible() else []
            whole = count // self._layout.chunk_tokens
            hit = min(self._lookup.prefix(keys, whole) * self._layout.chunk_tokens, count)
            self._counters.add(lookup_calls=1, lookup_tokens=count, lookup_hit_tokens=hit)
            return hit

    def store(
        self,
        tokens: Tokens,
        mask: Any = None,
        *,
        kvcaches: KVCaches,
        slot_mapping: Any,
        offset: int | None = None,
    ) -> None:
        """Copy the chunks of `tokens` that the pool lacks into it; when it returns they are committed.

        mask: one bool per token, False for a prefix that is stored already (whole chunks). offset: the same
        as a number of tokens. A chunk with a token without a slot is left out, and so is a last one that is
        not full, unless `engine.store_partial_chunks`.
        """
        with self._gate.call():
            self._store.run(self._to_store(tokens, mask, kvcaches, slot_mapping, offset))

    def store_async(
        self,
        tokens: Tokens,
        mask: Any = None,
        *,
        kvcaches: KVCaches,
        slot_mapping: Any,
        offset: int | None = None,
    ) -> StoreHandle:
        """As `store`, in the background: leave the pages alone until the handle is done.

        The copy runs after all that the caller had queued on its current stream, and is committed when it has
        really finished. With ASYNC_OPERATIONS_MAX under way nothing is stored and the handle is done.
        """
        with self._gate.call():
            transfer = self._to_store(tokens, mask, kvcaches, slot_mapping, offset)
            handle = self._operations.submit(lambda: self._store.run(transfer))
            return self._dropped(len(transfer)) if handle is None else handle

    def retrieve(self, tokens: Tokens, mask: Any = None, *, kvcaches: KVCaches, slot_mapping: Any) -> Tensor:
        """Load what there is of `tokens`; of each token (CPU, bool) whether it was loaded by this call.

        mask: as for `store`; loading begins at the first True. What was not loaded is to be computed, and
        its pages hold anything. Tokens without a slot are not loaded.
        """
        with self._gate.call():
            transfer, mask_of = self._to_retrieve(tokens, mask, kvcaches, slot_mapping)
            return mask_of(self._retrieve.run(transfer))

    def retrieve_async(
        self,
        tokens: Tokens,
        mask: Any = None,
        *,
        kvcaches: KVCaches,
        slot_mapping: Any,
        layers_per_event: int | None = None,
    ) -> RetrieveHandle[Tensor]:
        """As `retrieve`, in the background: leave the pages alone until the handle is done.

        The copy runs after all that the caller had queued on its current stream. layers_per_event: load so
        many layers at a time, under a pin, so that the handle's `wait_layer` lets a model start on the first
        ones. With ASYNC_OPERATIONS_MAX under way it is carried out here and now.
        """
        with self._gate.call():
            transfer, mask_of = self._to_retrieve(tokens, mask, kvcaches, slot_mapping)
            return self._begin_retrieve(transfer, mask_of, layers_per_event)

    # -- the pages form, for connectors with keys of their own, which are bound to model, layout, rank, tenant

    def lookup_pages(self, keys: Sequence[bytes]) -> int:
        """How many leading chunks of `keys` are in the pool or a lower tier."""
        with self._gate.call(), self._counters.seconds("lookup_seconds"):
            self._transfers.require_form("pages", "lookup")
            checked = self._transfers.bound_keys(keys)
            hit = self._lookup.prefix(checked)
            tokens = self._layout.chunk_tokens
            self._counters.add(
                lookup_calls=1, lookup_tokens=len(checked) * tokens, lookup_hit_tokens=hit * tokens
            )
            return hit

    def store_pages(self, keys: Sequence[bytes], *, kvcaches: KVCaches, pages: Any) -> int:
        """Copy pages, verbatim, into the chunks of `keys` that the pool lacks; how many of all it has then.

        pages: `layout.pages_per_chunk` page ids per key, one key after the other; a chunk with a -1 is left
        out.
        """
        with self._gate.call():
            return self._store.run(self._pages(keys, kvcaches, pages).with_all_ids())

    def store_pages_async(self, keys: Sequence[bytes], *, kvcaches: KVCaches, pages: Any) -> StoreHandle:
        """As `store_pages`, in the background, by the rules of `store_async`."""
        with self._gate.call():
            transfer = self._pages(keys, kvcaches, pages).with_all_ids()
            handle = self._operations.submit(lambda: self._store.run(transfer))
            return self._dropped(len(transfer)) if handle is None else handle

    def retrieve_pages(self, keys: Sequence[bytes], *, kvcaches: KVCaches, pages: Any) -> int:
        """Load the leading chunks of `keys` that there are; how many. Pages given as -1 are not written.

        The pages of the other chunks hold anything.
        """
        with self._gate.call():
            return self._retrieve.run(self._pages(keys, kvcaches, pages))

    def retrieve_pages_async(
        self, keys: Sequence[bytes], *, kvcaches: KVCaches, pages: Any, layers_per_event: int | None = None
    ) -> RetrieveHandle[int]:
        """As `retrieve_pages`, in the background, by the rules of `retrieve_async`."""
        with self._gate.call():
            return self._begin_retrieve(self._pages(keys, kvcaches, pages), int, layers_per_event)

    # -- both

    def contains(self, cache_key: bytes) -> Location:
        """Where a chunk is. cache_key: one of `KeyChain.keys`; in the pages form the engine's own key."""
        with self._gate.call():
            return self._lookup.where(self._transfers.bound_key(cache_key, "cache_key"))

    def remove(self, cache_keys: Sequence[bytes]) -> int:
        """Forget chunks, in the pool and in every lower tier; how many the pool had. Keys as for `contains`.

        What somebody reads just now he reads to the end. A tier that does not answer may keep its copy.
        """
        with self._gate.call():
            keys = [self._transfers.bound_key(key, "cache_keys") for key in cache_keys]
            if not keys:
                return 0
            with self._lower.passages.closed(keys):
                self._tier_work.forget(keys)
                removed = self._pool.remove(keys)
                self._lower.remove(keys)
            return removed

    def clear(self) -> int:
        """Forget all chunks of this model in the pool, and **all chunks of every model** in the lower tiers.

        How many the pool had. Tiers know chunks by their keys only, which do not tell whose they are.
        """
        with self._gate.call():
            with self._lower.passages.closed(None):
                self._tier_work.forget(None)
                removed = self._pool.clear()
                self._lower.clear()
            return removed

    @property
    def layout(self) -> KVLayout:
        """What a chunk is."""
        return self._layout

    @property
    def connected(self) -> bool:
        """Whether the metadata server answers."""
        with self._gate.call():
            return self._client.connected

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until the metadata server answers and has our segment; whether it does."""
        with self._gate.call():
            return self._client.wait_connected(timeout_s)

    def flush_tiers(self, timeout_s: float) -> bool:
        """Wait until all that was stored is written to the lower tiers, too; whether it is."""
        with self._gate.call():
            return self._tier_work.flush(timeout_s)

    def get_stats(self) -> dict[str, int | float | str]:
        """What happened so far: calls, chunks, tokens, bytes, seconds, failures by cause, client counters.

        `hits` and `misses` are chunks that retrieves asked for; `connected` is 1 while the server answers.
        """
        with self._gate.call():
            return {
                **self._counters.snapshot(),
                **{f"client_{name}": count for name, count in self._client.counters.items()},
                "connected": int(self._client.connected),
                "own_segment": self._client.own_segment,
                "tier_waiting_chunks": self._tier_work.waiting_chunks,
                "layout": self._layout.fingerprint.hex(),
            }

    def close(self) -> None:
        """Wait for running copies, then leave the pool and free the own segment. May be called again.

        In a child that fork() made it does nothing: all of it is the parent's.
        """
        if self._gate.forked or not self._gate.close():
            return
        self._operations.close()
        self._left.close()
        self._transfers.forget()

    def __enter__(self) -> VCacheEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- inside

    def _to_store(self, tokens: Any, mask: Any, kvcaches: Any, slot_mapping: Any, offset: Any) -> Transfer:
        self._transfers.require_form("tokens", "store_pages")
        transfer, _, _ = self._transfers.of_tokens(
            tokens, mask=mask, offset=offset, kvcaches=kvcaches, slot_mapping=slot_mapping
        )
        return transfer.with_all_ids()

    def _to_retrieve(
        self, tokens: Any, mask: Any, kvcaches: Any, slot_mapping: Any
    ) -> tuple[Transfer, Callable[[int], Tensor]]:
        """What is to be loaded, and the mask that so many loaded chunks mean."""
        self._transfers.require_form("tokens", "retrieve_pages")
        transfer, has_slot, masked = self._transfers.of_tokens(
            tokens, mask=mask, offset=None, kvcaches=kvcaches, slot_mapping=slot_mapping
        )

        def mask_of(chunks: int) -> Tensor:
            end = masked + sum(map(transfer.tokens_in, transfer.sizes[:chunks]))
            loaded = torch.zeros(len(has_slot), dtype=torch.bool)
            loaded[masked:end] = torch.from_numpy(has_slot[masked:end])
            return loaded

        return transfer, mask_of

    def _begin_retrieve(
        self, transfer: Transfer, result_of: Callable[[int], Result], layers_per_event: int | None
    ) -> RetrieveHandle[Result]:
        progress = None if layers_per_event is None else Progress(self._layout.num_layers, layers_per_event)

        def retrieve() -> Result:
            with progress or nullcontext():
                return result_of(self._retrieve.run(transfer, progress))

        handle = self._operations.submit(retrieve)
        return RetrieveHandle(finished(retrieve()) if handle is None else handle, progress, result_of)

    def _pages(self, keys: Any, kvcaches: Any, pages: Any) -> Transfer:
        self._transfers.require_form("pages", "store, retrieve and lookup")
        return self._transfers.of_pages(keys, kvcaches=kvcaches, pages=pages)

    def _dropped(self, chunks: int) -> StoreHandle:
        self._counters.add(unstored_chunks=chunks)
        self._counters.failed(
            Cause.ASYNC_LIMIT, "too many operations are under way to store more", chunks=chunks
        )
        return finished(0)


def _joined(config: Config, name: str, undo: ExitStack) -> Client:
    """A session that lends what is configured; its end is in `undo`."""
    lending = Lending(config)
    undo.callback(lending.close)
    client = lending.client(name)
    undo.callback(client.close)
    return client


def _session_path(config: Config) -> Path:
    return RuntimeDir.resolve(config.runtime_dir, group=config.server.group).session_path
