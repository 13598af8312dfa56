"""Small chunks of whole pages in host memory: one memmove for each page of each layer, and of those that are
scattered from equal distances one call for each layer (`even_runs`).

Calls into numpy cost some microseconds for each chunk and layer. Where a chunk has little of each layer (a
page of 32 KiB takes two microseconds to copy), they are most of the time; a memmove by address costs a third
of one. It releases the GIL, so threads divide what is more than a few of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from vcache.kernels import reference
from vcache.kernels.base import PagedKV
from vcache.kernels.even_runs import even_runs, scatters
from vcache.kernels.threads import spread, threads_for

_LAYER_BYTES_MAX: Final = 256 * 1024
"""Of one layer in one chunk: above, vector loops over strided pages are faster, and threads pay."""

_PAGE_BYTES_MIN: Final = 2 * 1024
"""Below, calls cost more than rows of a table."""

_TASK_BYTES: Final = 1024 * 1024
"""What a thread copies at a time: enough to be worth its taking, little enough that both end together."""

_THREAD_BYTES_MIN: Final = 2 * 1024 * 1024
"""Bytes per thread below which a copy is done before a helper thread is awake."""


_fitting: WeakKeyDictionary[PagedKV, bool] = WeakKeyDictionary()


def fits(paged: PagedKV) -> bool:
    """Whether its pages are copied this way: each one piece of memory, few of them in a chunk."""
    fitting = _fitting.get(paged)
    if fitting is None:
        fitting = _fitting[paged] = _fits(paged)
    return fitting


def _fits(paged: PagedKV) -> bool:
    layout = paged.layout
    if layout.form != "pages" or layout.page_bytes < _PAGE_BYTES_MIN:
        return False
    if layout.pages_per_chunk * layout.page_bytes > _LAYER_BYTES_MAX:
        return False
    return all(layer[0].is_contiguous() for layer in paged.layers)


def gather(paged: PagedKV, pages: Tensor, chunks: Sequence[Tensor], layers: range | None = None) -> None:
    """As `reference.gather`, for paged KV that fits."""
    (in_chunks, in_pages), zeroed = _moves(paged, pages.numpy(), chunks, layers)
    size = paged.layout.page_bytes
    threads, task_bytes = _division(len(in_chunks) * size)
    _carry_out(_copies(in_chunks, in_pages, size, task_bytes), threads)
    for address in zeroed.tolist():
        ctypes.memset(address, 0, size)


def scatter(paged: PagedKV, pages: Tensor, chunks: Sequence[Tensor], layers: range | None = None) -> None:
    """As `reference.scatter`, for paged KV that fits."""
    numbers, size = pages.numpy(), paged.layout.page_bytes
    chosen = reference.all_layers(paged) if layers is None else layers
    threads, task_bytes = _division(len(numbers) * len(chosen) * size)
    runs = even_runs(paged, numbers, chunks)
    tasks = scatters(paged, runs, chosen, task_bytes)
    members = {member for run in runs for member in run.members}
    left = [at for at in range(len(chunks)) if at not in members]
    if left:
        per_chunk = paged.layout.pages_per_chunk
        ids = [numbers[at * per_chunk : (at + 1) * per_chunk] for at in left]
        moves, _ = _moves(paged, np.concatenate(ids), [chunks[at] for at in left], layers)
        tasks += _copies(moves[1], moves[0], size, task_bytes)
    _carry_out(tasks, threads)


Addresses = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def _moves(
    paged: PagedKV, numbers: Addresses, chunks: Sequence[Tensor], layers: range | None
) -> tuple[tuple[Addresses, Addresses], Addresses]:
    """((in chunks, in the paged KV) of every page of these layers, and where in chunks no page is given)."""
    size, count = paged.layout.page_bytes, len(paged.layers)
    # Of a chunk: all pages of layer 0, then those of layer 1, …
    held = np.array([len(chunk) for chunk in chunks], np.int64) // (size * count)
    begin = int(held.sum())
    starts = np.repeat(np.array([chunk.data_ptr() for chunk in chunks], np.int64), held)
    within = np.arange(begin) - np.repeat(np.cumsum(held) - held, held)
    steps = np.arange(count)[:, None] * np.repeat(held, held)[None, :] + within[None, :]
    from_chunks = starts[None, :] + steps * size
    first = paged.layers[0]
    bases = np.array([layer.data_ptr() for layer in paged.layers], np.int64)
    strides = np.array([layer.stride(0) * first.element_size() for layer in paged.layers], np.int64)
    chosen = slice(None) if layers is None else list(layers)
    from_chunks, bases, strides = from_chunks[chosen], bases[chosen], strides[chosen]
    in_pages = bases[:, None] + strides[:, None] * numbers[None, :begin]
    given = np.broadcast_to(numbers[None, :begin] >= 0, in_pages.shape)
    return (from_chunks[given], in_pages[given]), from_chunks[~given]


def _copies(target: Addresses, source: Addresses, size: int, task_bytes: int) -> list[Callable[[], None]]:
    to, at = target.tolist(), source.tolist()
    step = max(1, task_bytes // size)

    def task(begin: int) -> None:
        memmove = ctypes.memmove
        for here, there in zip(to[begin : begin + step], at[begin : begin + step], strict=True):
            memmove(here, there, size)

    return [partial(task, begin) for begin in range(0, len(to), step)]


def _division(nbytes: int) -> tuple[int, int]:
    """(threads for so many bytes, bytes of a task)."""
    threads = threads_for(nbytes, _THREAD_BYTES_MIN)
    return threads, _TASK_BYTES if threads > 1 else max(nbytes, 1)


def _carry_out(tasks: Sequence[Callable[[], None]], threads: int) -> None:
    spread(lambda number: tasks[number](), len(tasks), threads)
