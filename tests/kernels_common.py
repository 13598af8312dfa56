"""Paged tensors in every layout that engines use, for the tests of kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcache.kernels import PagedKV
from vcache.layout import KVLayout

TOKEN_AXES = [
    "kpshd",
    "pkshd",
    "kphsd",
    "pkhsd",
    "phs(kd)",
    "psh(kd)",
    "lkpshd",
    "plkshd",
    "lpkhsd",
    "plhs(kd)",
]
LATENT_AXES = ["psd", "lpsd", "plsd", "pshd"]
DTYPES = ["bfloat16", "float16", "float32", "uint8", "float8_e4m3fn", "float8_e5m2"]

LAYERS, HEADS, HEAD_SIZE, PAGES, PAGE_TOKENS, CHUNK_TOKENS = 3, 2, 16, 24, 4, 16


def token_layout(dtype: str = "bfloat16", **change: Any) -> KVLayout:
    fields = {
        "num_layers": LAYERS,
        "num_kv_heads": HEADS,
        "head_size": HEAD_SIZE,
        "dtype": dtype,
        "chunk_tokens": CHUNK_TOKENS,
    }
    return KVLayout(**{**fields, **change})


def latent_layout(dtype: str = "bfloat16") -> KVLayout:
    return token_layout(dtype, num_kv_heads=1, head_size=36, kv_parts=1)


def random_bytes(count: int, seed: int) -> Tensor:
    """All bit patterns, NaNs among them."""
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def shape_of(axes: str, layout: KVLayout, pages: int = PAGES, page_tokens: int = PAGE_TOKENS) -> list[int]:
    sizes = {
        "l": layout.num_layers,
        "k": layout.kv_parts,
        "p": pages,
        "s": page_tokens,
        "h": layout.num_kv_heads,
        "d": layout.head_size,
    }
    if axes.endswith("(kd)"):
        return [sizes[axis] for axis in axes[:-4]] + [2 * layout.head_size]
    return [sizes[axis] for axis in axes]


def tensors(axes: str, layout: KVLayout, seed: int = 0, **sizes: int) -> list[Tensor]:
    """Contiguous paged tensors of random bits: one per layer, or one where the axes contain `l`."""
    shape = torch.Size(shape_of(axes, layout, **sizes))
    dtype = getattr(torch, layout.dtype)
    return [
        random_bytes(shape.numel() * dtype.itemsize, seed + index).view(dtype).view(shape)
        for index in range(1 if "l" in axes else layout.num_layers)
    ]


def paged_kv(axes: str, layout: KVLayout, seed: int = 0, **sizes: int) -> PagedKV:
    return PagedKV.from_tensors(tensors(axes, layout, seed, **sizes), axes, layout)


def chunks_for(paged: PagedKV, tokens: int, seed: int = 99) -> list[Tensor]:
    """Chunks of random bytes that hold `tokens` tokens, the last one partial where they do not divide."""
    layout = paged.layout
    sizes = [
        layout.bytes_for(min(layout.chunk_tokens, tokens - at))
        for at in range(0, tokens, layout.chunk_tokens)
    ]
    memory = random_bytes(sum(sizes), seed)
    return list(memory.split(sizes)) if sizes else []


def bits(paged: PagedKV) -> list[Tensor]:
    """A copy of all that is in the pages, as integers."""
    return [layer.clone() for layer in paged.layers]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
