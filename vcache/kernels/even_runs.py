"""Chunks of whole pages at equal distances in memory: scattered by one indexed assignment a layer.

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


@dataclass(frozen=True)
class EvenRun:
    """Whole chunks at equal distances in memory.

    members: which of the chunks they are. address: of the first. distance: bytes from one to the next. pages:
    `[chunk, page]`, none is -1.
    """

    members: list[int]
    address: int
    distance: int
    pages: Ids


def even_runs(paged: PagedKV, numbers: Ids, chunks: Sequence[Tensor]) -> list[EvenRun]:
    """The runs that are worth an array; chunks that are in none have to be copied otherwise."""
    per_chunk = paged.layout.pages_per_chunk
    runs = []
    for members, address, distance in _evenly_apart(paged.layout.chunk_bytes, chunks):
        if len(members) * per_chunk < _RUN_PAGES_MIN:
            continue
        pages = numbers[np.array(members)[:, None] * per_chunk + np.arange(per_chunk)]
        if pages.min() >= 0:
            runs.append(EvenRun(members, address, distance, pages))
    return runs


def _evenly_apart(size: int, chunks: Sequence[Tensor]) -> Iterator[tuple[list[int], int, int]]:
    """(which chunks, by address; address of the first; bytes from one to the next)."""
    addresses = [chunk.data_ptr() for chunk in chunks]
    whole = [at for at, chunk in enumerate(chunks) if chunk.numel() == size]
    whole.sort(key=addresses.__getitem__)
    begin = 0
    while begin < len(whole):
        end, distance = begin + 1, size
        while end < len(whole):
            apart = addresses[whole[end]] - addresses[whole[end - 1]]
            if end == begin + 1:
                distance = apart
            elif apart != distance:
                break
            end += 1
        yield whole[begin:end], addresses[whole[begin]], distance
        begin = end


def scatters(
    paged: PagedKV, runs: Sequence[EvenRun], layers: Sequence[int], task_bytes: int
) -> list[Callable[[], None]]:
    """Copies of these layers of the runs into their pages, of about `task_bytes` each; none was made yet.

    The memory of the runs' chunks must stay until they have been made.
    """
    tables = _tables_of(paged)
    tasks: list[Callable[[], None]] = []
    for run in runs:
        word = tables.word(run.address | run.distance)
        region, targets = _region(paged, run, word), tables.of(word)
        at_once = max(1, task_bytes // (run.pages.shape[1] * paged.layout.page_bytes))
        for begin in range(0, len(run.members), at_once):
            some = slice(begin, begin + at_once)
            pages, values = run.pages[some], region[:, some]
            tasks += [partial(targets[layer].__setitem__, pages, values[layer]) for layer in layers]
    return tasks


class _At:
    """Memory by its address, for numpy."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], kind: str) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, True),
            "shape": shape,
            "strides": strides,
            "typestr": kind,
        }


def _region(paged: PagedKV, run: EvenRun, word: int) -> Words:
    """A run's chunks, `[layer, chunk, page, word]`."""
    size = paged.layout.page_bytes
    chunks, pages = run.pages.shape
    shape = (len(paged.layers), chunks, pages, size // word)
    return np.asarray(_At(run.address, shape, (pages * size, run.distance, size, word), f"<i{word}"))


class _Tables:
    """The pages of each layer of paged KV as rows of words, for every width of a word."""

    def __init__(self, paged: PagedKV) -> None:
        size = paged.layout.page_bytes // paged.layers[0].element_size()
        self._bytes = [
            layer.as_strided((len(layer), size), (layer.stride(0), 1)).numpy().view(np.uint8)
            for layer in paged.layers
        ]
        self._bits = 8 | paged.layout.page_bytes
        for table in self._bytes:
            self._bits |= table.ctypes.data | table.strides[0]
        self._of: dict[int, list[Words]] = {}

    def word(self, bits: int) -> int:
        """Bytes of the widest word in which these addresses, and all of the tables', are whole."""
        bits |= self._bits
        return bits & -bits

    def of(self, word: int) -> list[Words]:
        """`[page, word]` of each layer."""
        tables = self._of.get(word)
        if tables is None:
            tables = self._of[word] = [table.view(f"u{word}") for table in self._bytes]
        return tables


_known: WeakKeyDictionary[PagedKV, _Tables] = WeakKeyDictionary()


def _tables_of(paged: PagedKV) -> _Tables:
    tables = _known.get(paged)
    if tables is None:
        tables = _known[paged] = _Tables(paged)
    return tables
