"""A worker's KV tensors as whole pages: one description per group, whatever lies inside a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from integration.vllm.groups import Group
from vcache.errors import ConfigError
from vcache.kernels import PagedKV
from vcache.layout import DTYPE_BYTES, KVLayout


@dataclass(frozen=True)
class GroupPages:
    """A group's pages on this rank: how they are described, and the layers that lie in them, in order."""

    paged: PagedKV
    layer_names: tuple[str, ...]


def describe_pages(
    group: Group, kv_caches: Mapping[str, Tensor], *, num_blocks: int, chunk_tokens: int, page_format: str
) -> GroupPages:
    """The group's layers as pages of bytes. Raises ConfigError where a page is not one piece of memory."""
    names, views = [], []
    seen: set[tuple[int, int]] = set()
    for name in group.layer_names:
        tensor = kv_caches.get(name)
        if tensor is None:  # a layer of another pipeline rank
            continue
        place = (tensor.data_ptr(), int(tensor.storage_offset()))
        if place not in seen:  # layers that share their KV have one tensor
            seen.add(place)
            names.append(name)
            views.append(page_bytes(name, tensor, num_blocks))
    if not views:
        raise ConfigError(f"KV group {group.index}: got no layer on this rank, wanted at least one")
    if len({view.shape for view in views}) > 1:
        sizes = sorted({view.shape[1] for view in views})
        raise ConfigError(f"KV group {group.index}: got pages of {sizes} bytes, wanted pages of one size")
    spec = getattr(group.spec, "first_spec", group.spec)
    merged = _across_layers(views)
    if merged is not None:
        page_format += f" layers={len(views)}"
        views = [merged]
    dtype = str(spec.dtype).removeprefix("torch.")
    layout = KVLayout(
        num_layers=len(views),
        num_kv_heads=int(spec.num_kv_heads),
        head_size=int(spec.head_size),
        dtype=dtype if dtype in DTYPE_BYTES else "uint8",
        kv_parts=1 if "MLA" in type(spec).__name__ else 2,
        chunk_tokens=chunk_tokens,
        form="pages",
        page_tokens=group.page_tokens,
        page_bytes=views[0].shape[1],
        page_format=page_format,
    )
    return GroupPages(PagedKV.from_tensors(views, "pb", layout), tuple(names))


def page_bytes(name: str, tensor: Tensor, num_blocks: int) -> Tensor:
    """A layer's tensor as (pages, bytes of a page). Raises ConfigError where a page is not one piece of
    memory.

    The backend may have divided vLLM's blocks into smaller ones; then several of these are a page.
    """
    if tensor.shape[0] % num_blocks:
        raise ConfigError(f"{name}: got {tensor.shape[0]} blocks, wanted a multiple of {num_blocks}")
    grid = tensor.detach().view(num_blocks, tensor.shape[0] // num_blocks, *tensor.shape[1:])
    inner = sorted(zip(grid.stride()[1:], grid.shape[1:], strict=True))
    expected = 1
    for stride, length in inner:
        if length > 1 and stride != expected:
            raise ConfigError(
                f"{name}: got a page in pieces (shape {tuple(tensor.shape)}, strides "
                f"{tensor.stride()}), wanted one whose bytes lie together: set VLLM_KV_CACHE_LAYOUT to "
                "LBNHC, LBHNC, BLNHC or BLHNC"
            )
        expected *= length
    size = tensor.element_size()
    flat = grid.as_strided((num_blocks, expected), (grid.stride(0), 1), grid.storage_offset())
    assert flat.shape[1] * size == grid[0].numel() * size
    return flat.view(torch.uint8)


def _across_layers(views: list[Tensor]) -> Tensor | None:
    """All layers' pages as one, where they lie one after the other: the fewest and largest copies."""
    first = views[0]
    if len(views) == 1:
        return None
    pages, size = first.shape
    for at, view in enumerate(views):
        if view.stride() != first.stride() or view.data_ptr() != first.data_ptr() + at * size:
            return None
    if first.stride(0) < len(views) * size:
        return None
    return first.as_strided((pages, len(views) * size), (first.stride(0), 1))


def attention_of(layers: Mapping[str, Any], name: str) -> tuple[str, str]:
    """(backend, instruction set) of a layer, as far as it says so."""
    layer = layers.get(name)
    if layer is None:
        return "unknown", ""
    backend = layer.get_attn_backend() if hasattr(layer, "get_attn_backend") else None
    return (backend.get_name() if backend is not None else type(layer).__name__), str(
        getattr(layer, "isa", "")
    )
