"""vLLM's groups of KV cache, as chunks see them: how many tokens a page holds, and how far back a layer
attends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from vcache.errors import ConfigError


@dataclass(frozen=True)
class Group:
    """One group of layers that share block tables.

    index: its place in vLLM's block tables. page_tokens: of one block. window_tokens: how many tokens before
    the next one its layers look at, 0 for all.
    """

    index: int
    page_tokens: int
    window_tokens: int
    layer_names: tuple[str, ...]
    spec: Any

    def pages_in(self, chunk_tokens: int) -> int:
        """Pages of one chunk."""
        return chunk_tokens // self.page_tokens


@dataclass(frozen=True)
class Groups:
    """All groups whose KV is found by hashes. hash_tokens: tokens that one of vLLM's block hashes covers."""

    groups: tuple[Group, ...]
    chunk_tokens: int
    hash_tokens: int

    def __iter__(self) -> Any:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def hashes_per_chunk(self) -> int:
        """Block hashes of one chunk; the last one stands for it."""
        return self.chunk_tokens // self.hash_tokens

    def hash_of(self, request: Any, chunk: int) -> bytes:
        """The block hash of a request that stands for one of its chunks."""
        return bytes(request.block_hashes[(chunk + 1) * self.hashes_per_chunk - 1])


def read_groups(vllm_config: Any, kv_cache_config: Any, chunk_tokens: int) -> Groups:
    """The groups of this engine. Raises ConfigError, in words, for what cannot be kept in chunks.

    chunk_tokens: as configured, 0 for one block (of several groups: for the least that all their blocks
    divide).
    """
    check_model(vllm_config.model_config)
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(
                f"{name}: got {getattr(parallel, name)}, wanted 1: VCache keeps no KV of tokens that "
                "are divided among ranks"
            )
    scheduler_tokens, hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    all_groups = kv_cache_config.kv_cache_groups
    ids = getattr(kv_cache_config, "prefix_cacheable_group_ids", range(len(all_groups)))
    groups = tuple(_group(index, all_groups[index]) for index in ids)
    if not groups:
        raise ConfigError("the model has no KV cache that is found by its tokens: nothing to share")
    chunk_tokens = chunk_tokens or scheduler_tokens
    if chunk_tokens % scheduler_tokens:
        raise ConfigError(
            f"chunk_tokens: got {chunk_tokens}, wanted a multiple of {scheduler_tokens}, vLLM's block size"
            + (" over all KV groups" if len(groups) > 1 else "")
        )
    return Groups(groups, chunk_tokens, hash_tokens)


def check_model(model: Any) -> None:
    """Raises ConfigError for models whose KV or whose answers are not those of a prefix that was computed
    before. vLLM's own prefix cache is off for them, but a connector is asked all the same.
    """
    if getattr(model, "is_diffusion", False):
        raise ConfigError(
            f"model: got {model.model}, a diffusion model, wanted one whose tokens look only at those before "
            "them: VCache keeps KV that what follows does not change"
        )
    if model.runner_type == "pooling" and not model.is_prefix_caching_supported:
        pooler = model.pooler_config
        raise ConfigError(
            f"pooler_config: got {pooler.seq_pooling_type} and {pooler.tok_pooling_type} pooling with "
            f"{model.attn_type} attention, wanted pooling that does without a prefix's tokens (LAST): vLLM "
            "has no prefix cache for this model and ends when a part of a prompt is loaded; serve it without "
            "VCache"
        )


def _group(index: int, group: Any) -> Group:
    spec = group.kv_cache_spec
    specs = list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
    windows = {_window_tokens(index, each) for each in specs}
    if len(windows) > 1:
        raise ConfigError(
            f"KV group {index}: got layers with windows of {sorted(windows)} tokens, wanted one window"
        )
    return Group(index, specs[0].block_size, windows.pop(), tuple(group.layer_names), spec)


def _window_tokens(index: int, spec: Any) -> int:
    """How far back the layers look; ConfigError for those whose state is not the KV of tokens, or changes
    with the tokens behind them.
    """
    if getattr(spec, "non_causal", False):
        raise ConfigError(
            f"KV group {index}: got layers that look ahead within a prompt (non_causal, prefix LM), wanted "
            "causal attention: their KV of a prefix changes with what follows it"
        )
    if isinstance(spec, SlidingWindowSpec):
        return int(spec.sliding_window) - 1 + int(getattr(spec, "extra_retained_tokens", 0))
    if type(spec) in (FullAttentionSpec, MLAAttentionSpec):
        return 0
    raise ConfigError(
        f"KV group {index}: got {type(spec).__name__}, wanted full attention, sliding-window attention "
        "or MLA: VCache keeps KV of tokens, and this layer's is something else (Mamba, cross attention, …)"
    )


def places_of(groups: Groups, parallel: Any) -> list[tuple[int, int]]:
    """All (pipeline rank, KV rank) that there are. MLA's KV is the same on all tensor-parallel ranks: one KV
    rank.
    """
    ranks = 1 if is_replicated(groups) else parallel.tensor_parallel_size
    return [(stage, rank) for stage in range(parallel.pipeline_parallel_size) for rank in range(ranks)]


def is_replicated(groups: Groups) -> bool:
    """Whether all tensor-parallel ranks hold the same KV."""
    return all(
        isinstance(getattr(group.spec, "first_spec", group.spec), MLAAttentionSpec) for group in groups.groups
    )
