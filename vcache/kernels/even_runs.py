"""Chunks of whole pages at equal distances in one segment: scattered by one indexed assignment a layer.

The value that is assigned has the *other* signedness: numpy casts it then in a vector loop, which keeps all
bits. It is as fast as one memcpy of everything, in any order of pages. memmove costs a call for each page
and layer, and is two to three times slower on processors of AMD where the target lies up to some 60 bytes
above the source within a page of memory (glibc bug 30994).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vcache.kernels.base import PagedKV

Words = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]

_RUN_PAGES_MIN: Final = 8
"""Of one layer: for fewer, making the arrays costs more than calls for each page."""

_known: WeakKeyDictionary[PagedKV, list[Words]] = WeakKeyDictionary()
"""Of each layer `[page, byte]`."""


@dataclass(frozen=True)
class EvenRun:
    """Whole chunks at equal distances, by address.

    members: which of the chunks they are. region: `[layer, chunk, page, byte]`. pages: `[chunk, page]`, none
    is -1.
    """

    members: list[int]
    region: Words
    pages: Ids


def even_runs(paged: PagedKV, numbers: Ids, chunks: Sequence[Tensor]) -> list[EvenRun]:
    """The runs that are worth an array; chunks that are in none have to be copied otherwise."""
    layout = paged.layout
    per_chunk = layout.pages_per_chunk
    runs = []
    for first, distance, members in _evenly_apart(layout.chunk_bytes, chunks):
        if len(members) * per_chunk < _RUN_PAGES_MIN:
            continue
        pages = numbers[np.array(members)[:, None] * per_chunk + np.arange(per_chunk)]
        if pages.min() >= 0:
            memory = first.as_strided((len(members), len(first)), (distance, 1)).numpy()
            region = memory.reshape(len(members), len(paged.layers), per_chunk, layout.page_bytes)
            runs.append(EvenRun(members, region.swapaxes(0, 1), pages))
    return runs


def _evenly_apart(size: int, chunks: Sequence[Tensor]) -> Iterator[tuple[Tensor, int, list[int]]]:
    """(chunk of the lowest address, bytes from one to the next, which chunks, by address) of one memory."""
    addresses = [chunk.data_ptr() for chunk in chunks]
    whole = [at for at, chunk in enumerate(chunks) if len(chunk) == size]
    whole.sort(key=addresses.__getitem__)
    begin = 0
    while begin < len(whole):
        first = chunks[whole[begin]]
        memory = first.untyped_storage()
        last = memory.data_ptr() + memory.nbytes() - size  # where a chunk of this memory begins at most
        end, distance = begin + 1, size
        while end < len(whole) and addresses[whole[end]] <= last:
            apart = addresses[whole[end]] - addresses[whole[end - 1]]
            if end == begin + 1:
                distance = apart
            elif apart != distance:
                break
            end += 1
        yield first, distance, whole[begin:end]
        begin = end


def scatters(
    paged: PagedKV, runs: Sequence[EvenRun], layers: Sequence[int], task_bytes: int
) -> list[Callable[[], None]]:
    """Copies of these layers of the runs into their pages, of about `task_bytes` each; none was made yet."""
    tables = _tables(paged)
    word = _word([*tables, *(run.region for run in runs)])
    tasks: list[Callable[[], None]] = []
    for run in runs:
        _, chunks, pages, size = run.region.shape
        at_once = max(1, task_bytes // (pages * size))
        region = run.region.view(f"i{word}")
        for layer in layers:
            table = tables[layer].view(f"u{word}")
            for begin in range(0, chunks, at_once):
                some = slice(begin, begin + at_once)
                tasks.append(partial(table.__setitem__, run.pages[some], region[layer, some]))
    return tasks


def _tables(paged: PagedKV) -> list[Words]:
    if paged not in _known:
        size = paged.layout.page_bytes // paged.layers[0].element_size()
        _known[paged] = [
            layer.as_strided((len(layer), size), (layer.stride(0), 1)).numpy().view(np.uint8)
            for layer in paged.layers
        ]
    return _known[paged]


def _word(arrays: Sequence[Words]) -> int:
    """Bytes of the widest word in which all their addresses, distances and lengths are whole."""
    bits = 8
    for array in arrays:
        bits |= array.ctypes.data | array.shape[-1]
        for stride in array.strides[:-1]:
            bits |= stride
    return bits & -bits
