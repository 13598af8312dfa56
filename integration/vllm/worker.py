"""A worker's half: moves whole pages between vLLM's tensors and the pool, as the scheduler's half orders."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from integration.vllm.below import Below
from integration.vllm.done import Done, Work
from integration.vllm.fetcher import Fetcher
from integration.vllm.groups import Groups, is_replicated
from integration.vllm.identity import group_identity, model_identity, page_format
from integration.vllm.layer_waits import LayerWaits
from integration.vllm.messages import Identity, Load, LoadPart, Orders, Place, Report, Save, SavePart
from integration.vllm.pools import started
from integration.vllm.settings import Configured
from integration.vllm.stats import Observed
from integration.vllm.tensors import GroupPages, attention_of, describe_pages
from vcache.client import Client
from vcache.engine.arguments import Transfer
from vcache.engine.copies import Copies
from vcache.engine.granted import GrantedLoads
from vcache.engine.lanes import Event, Lanes
from vcache.engine.lending import Lending
from vcache.engine.pool import Pool
from vcache.engine.stats import Cause, Counters
from vcache.engine.store import Store
from vcache.engine.write_back import WriteBack
from vcache.errors import LocalStateError, ServerError, Unavailable
from vcache.kernels import LaunchOptions, prepare
from vcache.kernels.affinity import use_all_cores
from vcache.limits import KEY_BYTES
from vcache.logs import Line
from vcache.tiers import Tier
from vcache.tiers.configured import make_tiers

_log = logging.getLogger("vcache.integration.vllm")

_MAP_AGAIN_S = 5.0
"""How long a new segment of a server that is known may stay unmapped, unless a load needs it before."""

_NO_KEY = bytes(KEY_BYTES)


@dataclass(frozen=True)
class _GroupHalf:
    """One group's way to and from the pool."""

    pages: GroupPages
    loads: GrantedLoads
    store: Store

    def transfer(self, keys: list[bytes], ids: tuple[int, ...], after: Event) -> Transfer:
        """Whole chunks in these pages, to be copied after what uses them now."""
        layout = self.pages.paged.layout
        sizes = [layout.chunk_bytes] * len(keys)
        pages = torch.from_numpy(np.array(ids, np.int64))
        return Transfer(self.pages.paged, keys, sizes, pages, layout.pages_per_chunk, after)


class WorkerHalf:
    """One rank's half. `register` makes it whole; until then it does nothing."""

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, groups: Groups, configured: Configured
    ) -> None:
        self._vllm_config = vllm_config
        self._num_blocks = kv_cache_config.num_blocks
        self._groups = groups
        self._configured = configured
        self._layerwise = configured.settings.layerwise
        self._waits = LayerWaits()
        self._lanes = Lanes()
        self._needed: list[Future[None]] = []
        self._counters = Counters()
        self.observed = Observed(self._counters)
        self._place: Place = (0, 0)
        self._saves_here = True
        self._halves: list[_GroupHalf] = []
        self._tiers: list[Tier] = []
        self._write_back: WriteBack | None = None
        self._identity: Identity | None = None
        self._client: Client | None = None
        self._lending: Lending | None = None
        self._done = Done()
        patience_s = configured.settings.fetch_deadline_ms / 1e3
        self._fetcher = Fetcher(groups, patience_s, self._counters, self._done)
        self._mapped_for = 0
        self._map_again_at_s = 0.0
        self._idle = False
        self._saves: list[Save] = []
        self._loader = started(ThreadPoolExecutor(1, "vcache-load", use_all_cores), 1)
        self._saver = started(ThreadPoolExecutor(1, "vcache-save", use_all_cores), 1)

    # -- beginning and end

    @property
    def identity(self) -> Identity | None:
        """What this rank's chunks are; None before `register`."""
        return self._identity

    def register(self, kv_caches: Mapping[str, Tensor]) -> None:
        """vLLM has allocated its KV tensors: describe them and join the pool. Raises VCacheError, in words,
        for what cannot be shared.
        """
        import vllm
        from vllm.config import get_layers_from_vllm_config
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        tensor_rank = get_tp_group().rank_in_group
        replicated = is_replicated(self._groups)
        self._place = (get_pp_group().rank_in_group, 0 if replicated else tensor_rank)
        self._fetcher.place = self._place
        self._saves_here = not replicated or tensor_rank == 0
        layers = get_layers_from_vllm_config(self._vllm_config, AttentionLayerBase)
        label, model = model_identity(self._vllm_config)
        described, identities = [], []
        for group in self._groups:
            name = next(name for name in group.layer_names if name in kv_caches)
            backend, isa = attention_of(layers, name)
            words = page_format(backend, isa, vllm.__version__, kv_caches[name])
            pages = describe_pages(
                group,
                kv_caches,
                num_blocks=self._num_blocks,
                chunk_tokens=self._groups.chunk_tokens,
                page_format=words,
            )
            described.append(pages)
            identities.append(group_identity(model, group, list(pages.layer_names), words))
        self._join(described, label)
        layouts = [pages.paged.layout for pages in described]
        self._identity = Identity(
            self._place,
            label,
            tuple(layout.fingerprint for layout in layouts),
            tuple(identities),
            tuple(layout.chunk_bytes for layout in layouts),
        )
        for group, layout in zip(self._groups, layouts, strict=True):
            _log.info(Line("shares KV", model=label, group=group.index, layout=layout.describe()))

    def _join(self, described: list[GroupPages], label: str) -> None:
        config = self._configured.config
        device = described[0].paged.device
        if device.type == "cuda":  # where the tensors are is no matter of configuration
            config = msgspec.structs.replace(config, device=f"cuda:{device.index or 0}")
        self._tiers = make_tiers(config) if self._saves_here else []
        self._lending = Lending(config)
        name = f"vllm-worker-{self._vllm_config.kv_transfer_config.engine_id}"[:60]
        self._client = client = self._lending.client(name)
        copies = Copies(self._counters, LaunchOptions(config.engine.sm_limit), loads=self._lanes)
        for pages in described:
            prepare(pages.paged)
            pool = Pool(client, self._counters, pages.paged.layout, label, config.device)
            loads = GrantedLoads(client, pool, copies, self._counters)
            layout = pages.paged.layout
            below = Below(pool, self._tiers, layout, self._counters, config) if self._tiers else None
            queue = below.queue if below and config.tiers.policy == "write-through" else None
            self._halves.append(_GroupHalf(pages, loads, Store(pool, copies, queue, self._counters)))
            self._fetcher.belows.append(below)
        below = self._fetcher.belows[0]
        if below and config.tiers.policy == "write-back":  # one takes what is evicted, of whatever group
            self._write_back = WriteBack(client, below.queue)
        if config.server.autostart:
            client.wait_connected(config.client.connect_timeout_ms / 1e3)
        self._keep_mapped()

    def close(self) -> None:
        """Wait for running copies, then leave the pool."""
        self._fetcher.stop()
        self._loader.shutdown(wait=True)
        self._saver.shutdown(wait=True)
        if self._write_back is not None:
            self._write_back.close()
        self._fetcher.close()
        for tier in self._tiers:
            tier.close()
        if self._client is not None:
            self._client.close()
        if self._lending is not None:
            self._lending.close()

    # -- loads

    def start_loads(self, orders: Orders) -> None:
        """Begin the step's loads, and wait for those that the step itself needs."""
        self._idle = orders.idle
        self._done.begin(Work.LOAD, len(orders.loads))
        for load in orders.loads:
            if load.is_async or self._layerwise:
                self._begin_load(load)
        for load in orders.loads:
            if not (load.is_async or self._layerwise):
                self._load_here(load)
        # Behind the loads, on which vLLM counts whatever else fails.
        self._begin_saves()  # with a speculator vLLM ends the step before in its last pipeline stage alone
        self._saves = orders.saves
        if orders.tell and self._identity is not None:
            self._done.tell(self._identity)
        self._fetcher.begin(orders)
        self._keep_mapped()

    def _load_here(self, load: Load) -> None:
        """Carry it out in this thread: the step waits for it anyhow, and a thread's turn takes its time."""
        try:
            after = self._queued()
        except Exception as error:  # of a driver's
            self._loaded(load, self._gave_up(load, error))
            return
        self._load(load, Counter(), after)

    def _begin_load(self, load: Load) -> None:
        awaited = [] if load.is_async else self._layers_of(load)
        self._waits.expect(awaited)
        try:
            future = self._loader.submit(self._load, load, Counter(awaited), self._queued())
        except Exception as error:  # the model waits for no load that does not begin
            self._waits.arrived(awaited)
            self._loaded(load, self._gave_up(load, error))
            return
        if not load.is_async:
            self._needed.append(future)

    def wait_for_layer(self, layer: str) -> None:
        """Return when the step's loads have brought this layer."""
        self._waits.wait(layer)

    def finish_loads(self) -> None:
        """Return when the loads that the step needs are done."""
        needed, self._needed = self._needed, []
        wait(needed)

    def _queued(self) -> Event:
        """That all has run which the model has queued so far: only then are its pages read or written."""
        return self._lanes.on(self._halves[0].pages.paged.device).caller()

    def _layers_of(self, load: Load) -> list[str]:
        """The layers that a load brings, each as often as it does."""
        parts = load.parts.get(self._place, ())
        return [name for part in parts for name in self._halves[part.group].pages.layer_names]

    def _load(self, load: Load, awaited: Counter[str], after: Event) -> None:
        """Carry out a load. Whatever happens, it is reported once, and by then no copy runs."""
        started_s = time.perf_counter()
        failed: int | None = None
        try:
            for part in load.parts.get(self._place, ()):
                chunk = self._load_part(part, load.lineage, after, awaited)
                if chunk is not None:
                    failed = chunk if failed is None else min(chunk, failed)
        except Exception as error:  # of ours or a driver's: vLLM computes what was to be loaded
            failed = self._gave_up(load, error)
        finally:
            self._waits.arrived(list(awaited.elements()))
            self._loaded(load, failed)
        self.observed.seconds("load_seconds", time.perf_counter() - started_s)

    def _gave_up(self, load: Load, error: Exception) -> int:
        """Say so; the chunk from which on nothing counts."""
        _log.error("a load failed", exc_info=error)
        self._counters.failed(Cause.MALFORMED, repr(error))
        return min((chunk for part in load.parts.get(self._place, ()) for chunk in part.chunks), default=0)

    def _loaded(self, load: Load, failed: int | None) -> None:
        parts = load.parts.get(self._place, ())
        with self._done.end(Work.LOAD) as finished:
            finished.report.loads[load.id] = 1
            if failed is not None:
                finished.report.failed[load.id] = failed
            if load.is_async:
                finished.received.add(load.request)
                if failed is not None:
                    finished.failed.add(load.request)
            elif failed is not None:
                finished.bad_blocks.update(self._pages_from(parts, failed))

    def _load_part(self, part: LoadPart, lineage: int, after: Event, awaited: Counter[str]) -> int | None:
        """The first chunk that did not arrive; None if all did. What the model waits for leaves `awaited`."""
        if part.incomplete:
            self._counters.failed(Cause.MALFORMED, "vLLM allocated blocks for which no chunk was found")
            return min(part.chunks, default=0)
        if not part.chunks:
            return None
        half = self._halves[part.group]

        def on_layer(layer: int) -> None:
            name = half.pages.layer_names[layer]
            awaited[name] -= 1
            self._waits.arrived([name])

        arrived = half.loads.run(
            half.transfer([_NO_KEY] * len(part.chunks), part.pages, after),
            part.extents,
            lineage,
            on_layer=on_layer if awaited and len(half.pages.paged.layers) > 1 else None,
        )
        return next((chunk for chunk, came in zip(part.chunks, arrived, strict=True) if not came), None)

    def _pages_from(self, parts: tuple[LoadPart, ...], chunk: int) -> set[int]:
        """The blocks of this chunk and of those after it."""
        pages: set[int] = set()
        for part in parts:
            per_chunk = self._groups.groups[part.group].pages_in(self._groups.chunk_tokens)
            for at, number in enumerate(part.chunks):
                if number >= chunk:
                    pages.update(part.pages[at * per_chunk : (at + 1) * per_chunk])
        return pages - {-1}

    # -- saves

    def start_saves(self, orders: Orders) -> None:
        """Begin to store; vLLM keeps the pages as they are until it is reported."""
        self.finish_loads()
        self._saves = orders.saves
        self._begin_saves()

    def _begin_saves(self) -> None:
        saves, self._saves = self._saves, []
        self._done.begin(Work.SAVE, len(saves))
        for save in saves:
            try:
                self._saver.submit(self._save, save, self._queued())
            except Exception as error:  # vLLM keeps no pages for a save that does not begin
                self._saved(save, stored=self._not_stored(error))

    def _keep_mapped(self) -> None:
        """Map the pool before anybody waits for it: for every server that we see, and again at times, since
        segments come.
        """
        epoch = 0 if self._client is None else self._client.epoch
        now_s = time.monotonic()
        if not epoch or (epoch == self._mapped_for and now_s < self._map_again_at_s):
            return
        self._mapped_for, self._map_again_at_s = epoch, now_s + _MAP_AGAIN_S
        with suppress(RuntimeError):  # closed
            self._saver.submit(self._map_segments)

    def _map_segments(self) -> None:
        assert self._client is not None
        with suppress(Unavailable, ServerError, LocalStateError):  # then at first use
            self._client.map_segments()

    def _save(self, save: Save, after: Event) -> None:
        started_s = time.perf_counter()
        stored = False
        try:
            parts = save.parts if self._saves_here else ()
            stored = sum(self._save_part(part, after) for part in parts) == len(parts)
        except Exception as error:  # of ours or a driver's
            stored = self._not_stored(error)
        finally:
            self._saved(save, stored=stored)
        self.observed.seconds("store_seconds", time.perf_counter() - started_s)

    def _not_stored(self, error: Exception) -> bool:
        """Say so; whether it was stored."""
        _log.error("a store failed", exc_info=error)
        self._counters.failed(Cause.MALFORMED, repr(error))
        return False

    def _saved(self, save: Save, *, stored: bool) -> None:
        with self._done.end(Work.SAVE) as finished:
            finished.report.saves[save.id] = 1
            finished.report.stored[save.id] = int(stored)

    def _save_part(self, part: SavePart, after: Event) -> bool:
        half = self._halves[part.group]
        keys = list(part.keys[self._place])
        return half.store.run(half.transfer(keys, part.pages, after)) == len(keys)

    # -- reports

    def results(self) -> KVConnectorTransferResults:
        """What arrived or failed since the last call. Of a step that computes nothing it waits a little for
        more, and always for the loads that the step itself needed: their failure is heard with the step.
        """
        self.finish_loads()
        return self._done.take(is_idle=self._idle)

    def bad_blocks(self) -> set[int]:
        """Blocks that synchronous loads did not fill; of what `results` took."""
        return self._done.bad_blocks()

    def report(self) -> Report | None:
        """What the scheduler's half has to know; of what `results` took."""
        return self._done.report()
