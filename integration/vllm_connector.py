"""VCache as a KV connector of vLLM: engines on one machine share the prefixes that any of them has computed.

    --kv-transfer-config '{"kv_connector": "VCacheConnector", "kv_role": "kv_both"}'

vLLM makes one in its scheduler and one in each worker; each has its half (`integration.vllm.scheduler`,
`integration.vllm.worker`), and this is where vLLM's calls meet them. What cannot work raises here, at start-
up; after that nothing of ours does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from integration.vllm.groups import read_groups
from integration.vllm.guard import guarded
from integration.vllm.logs import log_with_vllm
from integration.vllm.messages import Identity, Orders, Report
from integration.vllm.scheduler import SchedulerHalf
from integration.vllm.settings import read_settings
from integration.vllm.stats import VCachePromMetrics, VCacheStats
from integration.vllm.ways import loads_async, warn_of_traps
from integration.vllm.worker import WorkerHalf

_log = logging.getLogger("vcache.integration.vllm")


class VCacheConnector(KVConnectorBase_V1, SupportsHMA):
    """The facade. In the scheduler it has a SchedulerHalf, in a worker a WorkerHalf."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Check the configuration and join the pool. Raises ConfigError for what cannot work."""
        super().__init__(vllm_config, role, kv_cache_config)
        log_with_vllm()
        configured = read_settings(self._kv_transfer_config.kv_connector_extra_config)
        groups = read_groups(vllm_config, kv_cache_config, configured.settings.chunk_tokens)
        load_async = loads_async(
            configured.settings.load, vllm_config, groups, layerwise=configured.settings.layerwise
        )
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role == KVConnectorRole.SCHEDULER:
            warn_of_traps(vllm_config)
            self._scheduler = SchedulerHalf.of(vllm_config, groups, configured, load_async=load_async)
        else:
            self._worker = WorkerHalf(vllm_config, kv_cache_config, groups, configured)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a store that did not happen is a miss later, nothing more."""
        return False

    @guarded(lambda: None)
    def shutdown(self) -> None:
        """Leave the pool."""
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()

    # -- the scheduler's half

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """vLLM's block pool, in which blocks of saves are pinned."""
        assert self._scheduler is not None
        self._scheduler.bind_block_pool(gpu_block_pool)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """What all workers said of themselves, ours among them."""
        assert self._scheduler is not None
        ours = [each for each in metadata.values() if isinstance(each, Identity)]
        self._scheduler.hear({identity.place: identity for identity in ours})

    @guarded(lambda: None)
    def on_new_request(self, request: Any) -> None:
        """A request has arrived."""
        assert self._scheduler is not None
        self._scheduler.new_request(request)

    @guarded(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens the pool has beyond those; they are held until they are loaded or let go."""
        assert self._scheduler is not None
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    @guarded(lambda: None)
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """vLLM has given the request blocks, and wants so many tokens loaded into them."""
        assert self._scheduler is not None
        self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    @guarded(Orders)
    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        """The workers' orders for this step."""
        assert self._scheduler is not None
        return self._scheduler.orders(scheduler_output)

    @guarded(lambda: None)
    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers say of the last step."""
        assert self._scheduler is not None
        report = connector_output.kv_connector_worker_meta
        self._scheduler.reported(report if isinstance(report, Report) else None)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request is over (one KV group)."""
        return self.request_finished_all_groups(request, (block_ids,))

    @guarded(lambda: (False, None))
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request is over. Its blocks may go at once: those that are being stored are pinned one by one."""
        assert self._scheduler is not None
        self._scheduler.finished(request, block_ids)
        return False, None

    @guarded(lambda: False)
    def has_pending_push_work(self) -> bool:
        """Whether steps are wanted to hear of saves."""
        return self._scheduler is not None and self._scheduler.busy

    @guarded(lambda: False)
    def has_pending_block_frees(self) -> bool:
        """Whether blocks come back soon, so that nobody need be preempted for some."""
        return self._scheduler is not None and self._scheduler.frees_blocks

    @guarded(lambda: ())
    def take_events(self) -> Iterable[Any]:
        """KV events since the last call."""
        return () if self._scheduler is None else self._scheduler.take_events()

    @guarded(lambda: False)
    def reset_cache(self) -> bool | None:
        """Never find again what was stored until now; False if that cannot be promised now."""
        return None if self._scheduler is None else self._scheduler.reset()

    # -- a worker's half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """vLLM's KV tensors, by layer. Raises ConfigError for what cannot be shared."""
        assert self._worker is not None
        self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> Identity | None:
        """What this worker's chunks are, for the scheduler's half."""
        return None if self._worker is None else self._worker.identity

    @guarded(lambda: None)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin the step's loads; those that the step needs are done when it returns, or layer by layer."""
        if self._worker is not None and self._connector_metadata is not None:
            self._worker.start_loads(self._connector_metadata)

    @guarded(lambda: None)
    def wait_for_layer_load(self, layer_name: str) -> None:
        """Return when the step's loads have brought this layer."""
        if self._worker is not None:
            self._worker.wait_for_layer(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: chunks are stored when the step that completed them has come back well."""

    @guarded(lambda: None)
    def wait_for_save(self) -> None:
        """Begin the step's saves; they are reported when they are done."""
        if self._worker is not None and self._connector_metadata is not None:
            self._worker.start_saves(self._connector_metadata)

    @guarded(KVConnectorTransferResults)
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Asynchronous loads that are done, and those that failed."""
        assert self._worker is not None
        return self._worker.results()

    @guarded(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that synchronous loads did not fill."""
        return set() if self._worker is None else self._worker.bad_blocks()

    @guarded(lambda: None)
    def build_connector_worker_meta(self) -> Report | None:
        """What the scheduler's half has to know."""
        return None if self._worker is None else self._worker.report()

    # -- statistics

    @guarded(lambda: None)
    def get_kv_connector_stats(self) -> VCacheStats | None:
        """What happened since the last call, in this half."""
        half = self._scheduler or self._worker
        return None if half is None else half.observed.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> VCacheStats:
        """Statistics from what travelled."""
        return VCacheStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> VCachePromMetrics:
        """The metrics at vLLM's /metrics."""
        return VCachePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether the model must call us between its layers."""
        return bool(extra_config.get("layerwise", False))

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """On a GPU one page of all layers in one piece: the fewest and largest copies."""
        from vllm.platforms import current_platform

        layerwise = cls.requires_piecewise_for_cudagraph(
            vllm_config.kv_transfer_config.kv_connector_extra_config
        )
        return "BLHNC" if current_platform.is_cuda() and not layerwise else None
