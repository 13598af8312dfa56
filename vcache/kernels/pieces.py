"""Small chunks of whole pages in host memory: one memmove for each page of each layer.

Calls into numpy cost some microseconds for each chunk and layer. Where a chunk has little of each layer (a
page of 32 KiB takes two microseconds to copy), they are most of the time; a memmove by address costs a third
of one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

import numpy as np
from torch import Tensor

from vcache.kernels.base import PagedKV

_LAYER_BYTES_MAX: Final = 256 * 1024
"""Of one layer in one chunk: above, vector loops over strided pages are faster, and threads pay."""

_PAGE_BYTES_MIN: Final = 2 * 1024
"""Below, calls cost more than rows of a table."""


def fits(paged: PagedKV) -> bool:
    """Whether its pages are copied this way: each one piece of memory, few of them in a chunk."""
    layout = paged.layout
    if layout.form != "pages" or layout.page_bytes < _PAGE_BYTES_MIN:
        return False
    if layout.pages_per_chunk * layout.page_bytes > _LAYER_BYTES_MAX:
        return False
    return all(layer[0].is_contiguous() for layer in paged.layers)


def gather(paged: PagedKV, pages: Tensor, chunks: Sequence[Tensor], layers: range | None = None) -> None:
    """As `reference.gather`, for paged KV that fits."""
    moves, zeroed = _moves(paged, pages, chunks, layers)
    _move(moves[0], moves[1], paged.layout.page_bytes)
    for address in zeroed.tolist():
        ctypes.memset(address, 0, paged.layout.page_bytes)


def scatter(paged: PagedKV, pages: Tensor, chunks: Sequence[Tensor], layers: range | None = None) -> None:
    """As `reference.scatter`, for paged KV that fits."""
    moves, _ = _moves(paged, pages, chunks, layers)
    _move(moves[1], moves[0], paged.layout.page_bytes)


Addresses = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def _moves(
    paged: PagedKV, pages: Tensor, chunks: Sequence[Tensor], layers: range | None
) -> tuple[tuple[Addresses, Addresses], Addresses]:
    """((in chunks, in the paged KV) of every page of these layers, and where in chunks no page is given)."""
    size, count = paged.layout.page_bytes, len(paged.layers)
    numbers = pages.numpy()
    in_chunks, begin = [], 0
    for chunk in chunks:  # of a chunk: all pages of layer 0, then those of layer 1, …
        held = len(chunk) // (size * count)
        places = np.arange(held * count, dtype=np.int64).reshape(count, held) * size
        in_chunks.append(places + chunk.data_ptr())
        begin += held
    from_chunks = np.concatenate(in_chunks, axis=1)
    first = paged.layers[0]
    bases = np.array([layer.data_ptr() for layer in paged.layers], np.int64)
    strides = np.array([layer.stride(0) * first.element_size() for layer in paged.layers], np.int64)
    chosen = slice(None) if layers is None else list(layers)
    from_chunks, bases, strides = from_chunks[chosen], bases[chosen], strides[chosen]
    in_pages = bases[:, None] + strides[:, None] * numbers[None, :begin]
    given = np.broadcast_to(numbers[None, :begin] >= 0, in_pages.shape)
    return (from_chunks[given], in_pages[given]), from_chunks[~given]


def _move(target: Addresses, source: Addresses, size: int) -> None:
    memmove = ctypes.memmove
    for to, at in zip(target.tolist(), source.tolist(), strict=True):
        memmove(to, at, size)
