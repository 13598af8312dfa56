"""Gather and scatter from host memory to host memory, near the speed of one memcpy.

What measuring showed, and what is done about it:

- Pages in ascending order are one strided copy per layer. A ufunc that changes nothing (`numpy.positive` on
  integers) makes it as fast as one memcpy of everything: its vector loop keeps the hardware prefetcher
  running. memmove, which slice assignment and torch's copy_ end in, is a quarter slower for pieces below 1
  MiB.
- Pages or slots in any other order are rows of a table. Gather is `take(out=…, mode="clip")`; any other mode
  copies through a temporary. Scatter is an indexed assignment whose value has the *other* signedness: as a
  cast it runs such a vector loop and keeps all bits; between equal types it is one memmove per row, for whole
  pages a fifth slower.
- A row is as large as the inside of a page allows: the whole page, else all heads of a token, else one head.
- Threads are ours, not OpenMP's (see `vcache.kernels.threads`), and divide chunks × layers. All copies
  release the GIL.
- Tried and slower: torch's index_select, index_copy_ and index_put_, one memmove or one slice per page.

Layouts that are no such rows (head_size strided, layers of different strides, odd widths) go to the
reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from vcache.kernels import pieces, reference
from vcache.kernels.base import PagedKV
from vcache.kernels.rows import PageRun, Rows, Tables, Words, plan, tables_of
from vcache.kernels.threads import spread, threads_for

_THREAD_BYTES_MIN: Final = 512 * 1024
"""Bytes per thread below which a copy is done before a helper thread is awake."""

_known: WeakKeyDictionary[PagedKV, Tables | None] = WeakKeyDictionary()


def gather(paged: PagedKV, ids: Tensor, chunks: Sequence[Tensor], layers: range | None = None) -> None:
    """As `reference.gather`, for paged KV and chunks in host memory."""
    if pieces.fits(paged):
        pieces.gather(paged, ids, chunks, layers)
        return
    tables = _usable_tables(paged, chunks)
    if tables is None:
        reference.gather(paged, ids, chunks, layers)
    else:
        _copy(_gather_step, tables, paged, ids, chunks, layers)


def scatter(paged: PagedKV, ids: Tensor, chunks: Sequence[Tensor], layers: range | None = None) -> None:
    """As `reference.scatter`, for paged KV and chunks in host memory."""
    if pieces.fits(paged):
        pieces.scatter(paged, ids, chunks, layers)
        return
    tables = _usable_tables(paged, chunks)
    if tables is None:
        reference.scatter(paged, ids, chunks, layers)
    else:
        _copy(_scatter_step, tables, paged, ids, chunks, layers)


def _usable_tables(paged: PagedKV, chunks: Sequence[Tensor]) -> Tables | None:
    if paged not in _known:
        _known[paged] = tables_of(paged)
    tables = _known[paged]
    if tables is None or any(chunk.data_ptr() % tables.word.itemsize for chunk in chunks):
        return None
    return tables


_CopyStep = Callable[[Tables, int, Words, PageRun | Rows], None]


def _copy(
    copy_step: _CopyStep,
    tables: Tables,
    paged: PagedKV,
    ids: Tensor,
    chunks: Sequence[Tensor],
    layers: range | None,
) -> None:
    layers = reference.all_layers(paged) if layers is None else layers
    numbers = ids.numpy()
    count = reference.unit_bytes(paged)
    work: list[tuple[Words, list[PageRun | Rows]]] = []
    begin = 0
    parts, heads, words = tables.layers[0].shape[0], *tables.layers[0].shape[3:]
    for chunk in chunks:
        end = begin + len(chunk) // count
        region = chunk.numpy().view(tables.word).reshape(len(paged.layers), parts, end - begin, heads, words)
        work.append((region, plan(tables, numbers[begin:end])))
        begin = end

    def task(number: int) -> None:
        region, steps = work[number // len(layers)]
        layer = layers[number % len(layers)]
        for step in steps:
            copy_step(tables, layer, region[layer], step)

    moved = begin * count * len(layers) // len(paged.layers)
    spread(task, len(work) * len(layers), threads_for(moved, _THREAD_BYTES_MIN))


def _gather_step(tables: Tables, layer: int, region: Words, step: PageRun | Rows) -> None:
    if isinstance(step, PageRun):
        np.positive(
            tables.layers[layer][:, step.page : step.page + step.count], out=_run_of(tables, region, step)
        )
        return
    table = tables.flat[layer].reshape(-1, step.words)
    for part, rows in zip(region, step.rows, strict=True):
        out = part[step.begin : step.end]
        table.take(rows, axis=0, out=out.reshape(-1, step.words), mode="clip")
        if step.kept is not None:
            out[~step.kept] = 0


def _scatter_step(tables: Tables, layer: int, region: Words, step: PageRun | Rows) -> None:
    if isinstance(step, PageRun):
        np.positive(
            _run_of(tables, region, step), out=tables.layers[layer][:, step.page : step.page + step.count]
        )
        return
    table = tables.flat[layer].reshape(-1, step.words).view(f"u{tables.word.itemsize}")
    for part, rows in zip(region, step.rows, strict=True):
        values = part[step.begin : step.end]
        if step.kept is not None:
            rows = rows.reshape(len(step.kept), -1)[step.kept].ravel()
            values = values[step.kept]
        table[rows] = values.reshape(-1, step.words)


def _run_of(tables: Tables, region: Words, run: PageRun) -> Words:
    """The run's part of a chunk's layer, as `[k, p, s, h, d]`."""
    parts, _, heads, words = region.shape
    part = region[:, run.begin : run.begin + run.count * tables.slots]
    return part.reshape(parts, run.count, tables.slots, heads, words)
