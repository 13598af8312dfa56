"""Gather and scatter by the GPU's copy engine: one cudaMemcpyAsync for each contiguous piece.

A kernel moves many small pieces in one launch; the copy engine needs a call of microseconds for each, takes
no multiprocessor, and reaches the speed of the memory or the link when pieces are long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Final

import numpy as np
import torch
from torch import Tensor

from vcache.kernels.base import PagedKV
from vcache.kernels.planes import Planes

PIECE_BYTES_MIN: Final = 8 << 20
"""Mean length of the contiguous pieces from which on this is used instead of the kernel.

Published: a kernel wins at 28 KiB and below (vLLM's tuning of its offloading). In between nothing was
measured by us; `python -m benchmarks gpu` prints both ways from 4 KiB to 8 MiB, and this is to become the
crossover that it shows. Until then it is a length at which one call of some 5 µs costs less than 0.2 % of the
time of its copy.
"""


def is_faster(planes: Planes, ids: Tensor) -> bool:
    """Whether these ids are pieces of PIECE_BYTES_MIN and more, and cupy is there to copy them.

    Ids on a GPU are not waited for: False.
    """
    if len(planes.row_offsets) > 1 or ids.device.type != "cpu" or not _has_cupy():
        return False
    unit_bytes = planes.unit_words * planes.word
    if len(ids) * unit_bytes < PIECE_BYTES_MIN:
        return False
    return len(ids) * unit_bytes >= PIECE_BYTES_MIN * len(_piece_starts(planes, ids))


@cache
def _has_cupy() -> bool:
    return find_spec("cupy") is not None


def copy(
    paged: PagedKV, planes: Planes, ids: Tensor, chunks: Sequence[Tensor], layers: range, *, to_chunks: bool
) -> None:
    """Copy the planes of `layers` piece by piece, on the current stream. ids: on the CPU."""
    from cupy.cuda import runtime

    stream = torch.cuda.current_stream(paged.device).cuda_stream
    with torch.cuda.device(paged.device):
        for in_paged, in_chunk, length in pieces(planes, ids, chunks, layers):
            if in_paged is None:
                if to_chunks:
                    runtime.memsetAsync(in_chunk, 0, length, stream)
                continue
            to, source = (in_chunk, in_paged) if to_chunks else (in_paged, in_chunk)
            runtime.memcpyAsync(to, source, length, runtime.memcpyDefault, stream)


def pieces(
    planes: Planes, ids: Tensor, chunks: Sequence[Tensor], layers: range
) -> Iterator[tuple[int | None, int, int]]:
    """Address in paged KV (None where ids are -1), address in a chunk, and length in bytes of every piece."""
    unit_bytes = planes.unit_words * planes.word
    begin = 0
    for chunk in chunks:
        count = len(chunk) // (unit_bytes * len(planes.addresses))
        part = ids[begin : begin + count]
        begin += count
        starts = _piece_starts(planes, part)
        numbers = part.numpy()
        words = planes.starts(numbers)
        for plane in range(layers.start * planes.per_layer, layers.stop * planes.per_layer):
            base = chunk.data_ptr() + plane * count * unit_bytes
            for at, end in zip(starts, [*starts[1:], count], strict=True):
                kept = numbers[at] >= 0
                in_paged = int(planes.addresses[plane]) + int(words[at]) * planes.word if kept else None
                yield in_paged, base + at * unit_bytes, (end - at) * unit_bytes


def _piece_starts(planes: Planes, ids: Tensor) -> list[int]:
    """Where units do not follow each other in memory; a run of -1 is a piece, too."""
    numbers = ids.numpy()
    starts = planes.starts(numbers)
    follows = np.diff(starts) == planes.unit_words
    none = numbers < 0
    same_kind = none[1:] == none[:-1]
    joined = np.where(none[1:], same_kind, follows & same_kind)
    breaks: list[int] = (np.flatnonzero(~joined) + 1).tolist()
    return [0, *breaks]
