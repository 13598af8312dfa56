"""Which pieces of paged KV a chunk consists of: runs of pages, or rows of a table. Nothing is copied here."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vcache.kernels.base import PagedKV

Words = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]

_ROW_BYTES_MIN: Final = 32
"""Rows below this cost more in row numbers than in bytes: the reference is no slower."""

_RUN_PIECE_BYTES_MIN: Final = 4096
"""Runs of pages are copied as slices if their contiguous pieces reach this; below, rows are faster."""

_RUN_PAGES_MIN: Final = 4
"""Mean length from which runs of pages are copied one by one; shorter ones cost more calls than they save."""


@dataclass(frozen=True)
class Tables:
    """One paged KV cache as numpy sees it, all layers alike, in words as wide as addresses and strides allow.

    layers: per layer `[k, p, s, h, d]`, d contiguous. In the pages form an id is a page, k and s are 1, and
        h and d are what the inside of a page folds into.
    flat: per layer the words from its first to its last, to be cut into rows.
    strides: of k, p, s, h, in words. slots: length of s.
    page_words: length of the row that is a page of one K/V part; 0 where a page is no row.
    row_words, row_offsets: length of the rows that a token of one K/V part consists of, and where in it they
    begin.
    run_bytes: what is contiguous within a run of pages.
    """

    word: np.dtype[Any]
    layers: list[Words]
    flat: list[Words]
    strides: tuple[int, int, int, int]
    slots: int
    page_words: int
    row_words: int
    row_offsets: Ids
    run_bytes: int


@dataclass(frozen=True)
class PageRun:
    """Step: pages `page` … `page + count - 1` are the chunk's tokens from `begin` on."""

    begin: int
    page: int
    count: int


@dataclass(frozen=True)
class Rows:
    """Step: per K/V part the numbers of the rows that are the chunk's tokens `begin` … `end - 1`.

    words: length of a row.
    kept: selects the tokens that have a slot; None if all have. The others' row numbers are valid, but mean
    nothing.
    """

    begin: int
    end: int
    words: int
    rows: list[Ids]
    kept: npt.NDArray[np.bool_] | None = None


def tables_of(paged: PagedKV) -> Tables | None:
    """The tables of a paged KV cache in host memory; None where its elements are not rows of one table."""
    views = [_five_axes(paged, layer) for layer in paged.layers]
    first = views[0]
    if first is None or any(view is None or view.stride() != first.stride() for view in views):
        return None
    if first.stride(4) != 1:
        return None
    layers = [view for view in views if view is not None]
    size = first.element_size()
    strides = [stride * size for stride in first.stride()[:4]]
    width = gcd(8, first.shape[4] * size, *strides, *(layer.data_ptr() for layer in layers))
    word = np.dtype(f"i{width}")
    return _tables(first, [stride // width for stride in strides], word, layers)


def _tables(first: Tensor, strides: list[int], word: np.dtype[Any], layers: list[Tensor]) -> Tables | None:
    k, p, s, h, d = first.shape
    words = d * first.element_size() // word.itemsize
    span = words + sum((length - 1) * stride for length, stride in zip((k, p, s, h), strides, strict=True))
    row, offsets = words, np.arange(h) * strides[3]
    if h == 1 or strides[3] == words:
        row, offsets = words * h, np.zeros(1, np.int64)
    page = row * s if len(offsets) == 1 and (s == 1 or strides[2] == row) else 0
    unit = gcd(row, strides[0], strides[1], strides[2], *(int(offset) for offset in offsets))
    if unit * word.itemsize < _ROW_BYTES_MIN:
        return None
    return Tables(
        word=word,
        layers=[layer.numpy().view(word) for layer in layers],
        flat=[
            layer.as_strided((span * word.itemsize // first.element_size(),), (1,)).numpy().view(word)
            for layer in layers
        ],
        strides=(strides[0], strides[1], strides[2], strides[3]),
        slots=s,
        page_words=page if page and strides[0] % page == strides[1] % page == 0 else 0,
        row_words=unit,
        row_offsets=(offsets[:, None] + np.arange(0, row, unit)).ravel(),
        run_bytes=max(page, row if s == 1 else 0) * word.itemsize,
    )


def _five_axes(paged: PagedKV, layer: Tensor) -> Tensor | None:
    """`[k, p, s, h, d]`, or None where pages do not fold into it. Lengths of 1 get stride 0."""
    shape, strides = list(layer.shape), list(layer.stride())
    if paged.layout.form == "pages":
        inner: list[tuple[int, int]] = []
        for length, stride in zip(shape[1:], strides[1:], strict=True):
            if length == 1:
                continue
            if inner and inner[-1][1] == length * stride:
                inner[-1] = (inner[-1][0] * length, stride)
            else:
                inner.append((length, stride))
        if len(inner) > 2:
            return None
        while len(inner) < 2:
            inner.insert(0, (1, 1)) if inner else inner.append((1, 1))
        shape = [1, shape[0], 1, inner[0][0], inner[1][0]]
        strides = [0, strides[0], 0, inner[0][1], inner[1][1]]
    strides[:4] = [stride if length > 1 else 0 for length, stride in zip(shape[:4], strides[:4], strict=True)]
    if shape[4] == 1:
        strides[4] = 1
    return layer.as_strided(shape, strides)


def plan(tables: Tables, ids: Ids) -> list[PageRun | Rows]:
    """The steps that copy one chunk, whose slots (pages form: whose pages) are `ids`."""
    pages = _leading_pages(ids, tables.slots)
    steps = _page_steps(tables, pages) if len(pages) else []
    begin = len(pages) * tables.slots if steps else 0
    if begin < len(ids):
        steps.append(_token_rows(tables, ids[begin:], begin))
    return steps


def _leading_pages(ids: Ids, slots: int) -> Ids:
    """The pages that the chunk begins with, whole and in order."""
    grid = ids[: len(ids) // slots * slots].reshape(-1, slots)
    first = grid[:, :1]
    whole = (first[:, 0] >= 0) & (first[:, 0] % slots == 0) & (grid == first + np.arange(slots)).all(axis=1)
    count = len(whole) if whole.all() else int(whole.argmin())
    return grid[:count, 0] // slots


def _page_steps(tables: Tables, pages: Ids) -> list[PageRun | Rows]:
    """Few runs of consecutive pages: each for itself. Else each page a row; none where a page is not one."""
    starts = np.concatenate(([0], np.flatnonzero(np.diff(pages) != 1) + 1, [len(pages)]))
    if tables.run_bytes >= _RUN_PIECE_BYTES_MIN and len(pages) >= _RUN_PAGES_MIN * (len(starts) - 1):
        runs = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        return [PageRun(begin * tables.slots, int(pages[begin]), end - begin) for begin, end in runs]
    if not tables.page_words:
        return []
    rows = [(part + pages * tables.strides[1]) // tables.page_words for part in _part_offsets(tables)]
    return [Rows(0, len(pages) * tables.slots, tables.page_words, rows)]


def _token_rows(tables: Tables, ids: Ids, begin: int) -> Rows:
    kept = ids >= 0
    slots = ids if kept.all() else np.where(kept, ids, 0)
    starts = slots // tables.slots * tables.strides[1] + slots % tables.slots * tables.strides[2]
    words = (starts[:, None] + tables.row_offsets).ravel()
    rows = [(part + words) // tables.row_words for part in _part_offsets(tables)]
    return Rows(begin, begin + len(ids), tables.row_words, rows, None if slots is ids else kept)


def _part_offsets(tables: Tables) -> range:
    parts = tables.layers[0].shape[0]
    return range(0, parts * tables.strides[0], tables.strides[0]) if parts > 1 else range(1)
