"""Where the words of paged KV lie, as the GPU kernel wants to know it: planes, units and rows."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vcache.kernels.base import PagedKV

ALIGN_MAX: Final = 16
"""Bytes of the widest access that a GPU makes for one thread: more alignment is of no use."""

WORD_MAX: Final = 8
"""Bytes of the widest integer; two neighbours become one access where ALIGN_MAX allows."""


@dataclass(frozen=True)
class Planes:
    """Paged KV as planes of equal form (see `vcache.kernels.triton_copy`); strides and offsets in words.

    addresses: of each plane, layer by layer. per_layer: planes of a layer. word: bytes. align: what
    addresses, strides and row lengths are multiples of, in bytes; at most ALIGN_MAX. slots: of a page; 1 in
    the pages form.
    """

    addresses: npt.NDArray[np.int64]
    per_layer: int
    word: int
    align: int
    slots: int
    page_stride: int
    slot_stride: int
    row_offsets: npt.NDArray[np.int64]
    row_words: int

    @property
    def unit_words(self) -> int:
        """Words of a unit in one plane."""
        return len(self.row_offsets) * self.row_words

    def starts(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where each unit begins in its plane, in words; for ids that are not -1."""
        return ids // self.slots * self.page_stride + ids % self.slots * self.slot_stride


def planes_of(paged: PagedKV, align: int = ALIGN_MAX) -> Planes | None:
    """The planes of paged KV, for chunks at multiples of `align` bytes; None if strides differ by layer."""
    first = paged.layers[0]
    if any(_meaningful_strides(layer) != _meaningful_strides(first) for layer in paged.layers):
        return None
    size = first.element_size()
    if paged.layout.form == "pages":
        parts, part_stride, unit_strides, inner = 1, 0, (first.stride(0), 0), 1
    else:
        parts, part_stride = first.shape[0], first.stride(0) if first.shape[0] > 1 else 0
        unit_strides = first.stride(1), first.stride(2) if first.shape[2] > 1 else 0
        inner = 3
    shape, strides = first.shape[inner:], first.stride()[inner:]
    row, outer = _contiguous_tail(list(shape), list(strides))
    offsets = _offsets(list(shape[:outer]), list(strides[:outer]))
    addresses = np.array(
        [layer.data_ptr() + part * part_stride * size for layer in paged.layers for part in range(parts)],
        np.int64,
    )
    lengths = (align, ALIGN_MAX, row * size, *(stride * size for stride in unit_strides))
    align = gcd(*lengths, *(int(offset) * size for offset in offsets), *addresses.tolist())
    word = min(align, WORD_MAX)
    return Planes(
        addresses=addresses,
        per_layer=parts,
        word=word,
        align=align,
        slots=1 if paged.layout.form == "pages" else paged.page_tokens,
        page_stride=unit_strides[0] * size // word,
        slot_stride=unit_strides[1] * size // word,
        row_offsets=offsets * size // word,
        row_words=row * size // word,
    )


def _meaningful_strides(layer: Tensor) -> list[int]:
    return [stride for length, stride in zip(layer.shape, layer.stride(), strict=True) if length > 1]


def _contiguous_tail(shape: list[int], strides: list[int]) -> tuple[int, int]:
    """How many elements lie side by side, and how many leading dimensions are not among them."""
    row = 1
    for axis in reversed(range(len(shape))):
        if shape[axis] > 1 and strides[axis] != row:
            return row, axis + 1
        row *= shape[axis]
    return row, 0


def _offsets(shape: list[int], strides: list[int]) -> npt.NDArray[np.int64]:
    """Of each row, in the order of a chunk, in elements."""
    offsets = np.zeros(1, np.int64)
    for length, stride in zip(shape, strides, strict=True):
        offsets = (offsets[:, None] + np.arange(length, dtype=np.int64) * stride).ravel()
    return offsets
