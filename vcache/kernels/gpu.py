"""Gather and scatter on a GPU: one launch of `vcache.kernels.triton_copy` for all layers and chunks.

- A program moves tiles of BLOCK words, every thread several 16-byte pieces before it waits for one: what is
  under way, and not the number of threads, is what fills a memory or a link.
- A tile is small, so that one chunk of 2 MiB has one for every multiprocessor; the programs are as many as
  fit on the chip at once and go on to further tiles, so that 64 chunks pay for no more launches than one.
- With a limit, programs are larger and no more than the multiprocessors allowed: the scheduler of the GPU
  gives each program one of its own while there are free ones.
- Slots, pages and addresses travel to the GPU in one small copy on the same stream.

Everything here is ordered on the current stream. The copy engine takes over for very long pieces
(`vcache.kernels.copy_engine`). Layers whose strides differ from each other go to the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from vcache.kernels import copy_engine, reference
from vcache.kernels.base import PagedKV
from vcache.kernels.launch import NO_LIMIT, LaunchOptions
from vcache.kernels.planes import ALIGN_MAX, Planes, planes_of
from vcache.kernels.triton_copy import copy_words


@dataclass(frozen=True)
class _Shape:
    """Words of a tile, and the warps of a program that moves it."""

    block: int
    warps: int


_SPREAD: Final = _Shape(block=2048, warps=4)
"""16 KiB a tile: 8 accesses of 16 bytes under way in each of 128 threads."""

_NARROW: Final = _Shape(block=8192, warps=16)
"""For few multiprocessors: 64 KiB under way in each."""

_PROGRAMS_PER_SM: Final = 6
"""What fits on a multiprocessor at once: 65,536 registers, of which 128 threads take 80 each."""

_PLANE_WORDS_MAX: Final = 1 << 30
"""Words of one plane in one launch, so that the kernel numbers them in 32 bits with room for a last tile."""


@dataclass(frozen=True)
class _Described:
    """The planes of one paged KV cache, and its tables in GPU memory."""

    planes: Planes
    addresses: Tensor
    row_offsets: Tensor


_known: WeakKeyDictionary[PagedKV, dict[int, _Described | None]] = WeakKeyDictionary()


def gather(
    paged: PagedKV,
    ids: Tensor,
    chunks: Sequence[Tensor],
    layers: range | None = None,
    options: LaunchOptions = NO_LIMIT,
) -> None:
    """As `reference.gather`, for paged KV and chunks in memory that the current GPU reaches."""
    _copy(paged, ids, chunks, layers, options, to_chunks=True)


def scatter(
    paged: PagedKV,
    ids: Tensor,
    chunks: Sequence[Tensor],
    layers: range | None = None,
    options: LaunchOptions = NO_LIMIT,
) -> None:
    """As `reference.scatter`, for paged KV and chunks in memory that the current GPU reaches."""
    _copy(paged, ids, chunks, layers, options, to_chunks=False)


def prepare(paged: PagedKV) -> None:
    """Compile and load the kernels for this paged KV, for chunks at aligned addresses, and wait for it.

    To be called before the first request, and never while a graph is captured.
    """
    described = _describe(paged, ALIGN_MAX)
    if described is None:
        return
    none = torch.zeros(1, dtype=torch.int64, device=paged.device)
    for to_chunks in (True, False):
        for shape in (_SPREAD, _NARROW):
            # No tile, so nothing is copied: but compiled, loaded and launched.
            _launch(described, paged, none, none, _Work(1, 0, 0, 0, 0), 1, shape, to_chunks=to_chunks)
    if paged.device.type == "cuda":
        torch.cuda.current_stream(paged.device).synchronize()


@dataclass(frozen=True)
class _Work:
    """What one launch moves. last_units: of the last chunk. first_plane, num_planes: the layers asked for."""

    num_chunks: int
    units: int
    last_units: int
    first_plane: int
    num_planes: int


def _copy(
    paged: PagedKV,
    ids: Tensor,
    chunks: Sequence[Tensor],
    layers: range | None,
    options: LaunchOptions,
    *,
    to_chunks: bool,
) -> None:
    layers = range(len(paged.layers)) if layers is None else layers
    if not chunks or not layers:
        return
    described = _describe(paged, gcd(ALIGN_MAX, *(chunk.data_ptr() for chunk in chunks)))
    if described is None:
        copy = reference.gather if to_chunks else reference.scatter
        copy(paged, ids, chunks, layers)
        return
    if copy_engine.is_faster(described.planes, ids):
        copy_engine.copy(paged, described.planes, ids, chunks, layers, to_chunks=to_chunks)
        return
    per_chunk = _units_per_chunk(paged)
    step = max(1, _PLANE_WORDS_MAX // (described.planes.unit_words * per_chunk))
    for begin in range(0, len(chunks), step):
        part = chunks[begin : begin + step]
        at = begin * per_chunk
        _copy_part(
            described, paged, ids[at : at + step * per_chunk], part, layers, options, to_chunks=to_chunks
        )


def _copy_part(
    described: _Described,
    paged: PagedKV,
    ids: Tensor,
    chunks: Sequence[Tensor],
    layers: range,
    options: LaunchOptions,
    *,
    to_chunks: bool,
) -> None:
    """One launch."""
    planes, per_chunk = described.planes, _units_per_chunk(paged)
    on_gpu_ids, on_gpu_chunks = _tables(paged.device, ids, chunks)
    work = _Work(
        num_chunks=len(chunks),
        units=len(ids),
        last_units=len(ids) - (len(chunks) - 1) * per_chunk,
        first_plane=layers.start * planes.per_layer,
        num_planes=len(layers) * planes.per_layer,
    )
    shape = _NARROW if options.sm_limit else _SPREAD
    tiles = _plane_tiles(planes, work, shape) * work.num_planes
    programs = min(tiles, options.sm_limit or _PROGRAMS_PER_SM * _multiprocessors(paged.device))
    _launch(described, paged, on_gpu_ids, on_gpu_chunks, work, programs, shape, to_chunks=to_chunks)


def _launch(
    described: _Described,
    paged: PagedKV,
    ids: Tensor,
    chunks: Tensor,
    work: _Work,
    programs: int,
    shape: _Shape,
    *,
    to_chunks: bool,
) -> None:
    planes = described.planes
    plane_tiles = _plane_tiles(planes, work, shape)
    with _current(paged.device):
        copy_words[(programs,)](
            ids,
            chunks,
            described.addresses,
            described.row_offsets,
            work.first_plane,
            work.units,
            plane_tiles * work.num_planes,
            max(1, plane_tiles),
            work.num_chunks - 1,
            work.last_units,
            num_warps=shape.warps,
            **constants(planes, _units_per_chunk(paged), shape.block, to_chunks=to_chunks),
        )


def constants(planes: Planes, units_per_chunk: int, block: int, *, to_chunks: bool) -> dict[str, Any]:
    """What is constant in the kernel that copies such planes."""
    return {
        "TO_CHUNKS": to_chunks,
        "WORD": getattr(tl, f"int{8 * planes.word}"),
        "ALIGN": planes.align,
        "UNITS": units_per_chunk,
        "ROWS": len(planes.row_offsets),
        "WORDS": planes.row_words,
        "SLOTS": planes.slots,
        "PAGE_STRIDE": planes.page_stride,
        "SLOT_STRIDE": planes.slot_stride,
        "BLOCK": block,
    }


def _plane_tiles(planes: Planes, work: _Work, shape: _Shape) -> int:
    return -(-work.units * planes.unit_words // shape.block)


def _units_per_chunk(paged: PagedKV) -> int:
    layout = paged.layout
    return layout.pages_per_chunk if layout.form == "pages" else layout.chunk_tokens


def _describe(paged: PagedKV, align: int) -> _Described | None:
    by_align = _known.setdefault(paged, {})
    if align not in by_align:
        planes = planes_of(paged, align)
        by_align[align] = None if planes is None else _in_gpu_memory(planes, paged.device)
    return by_align[align]


def _in_gpu_memory(planes: Planes, device: torch.device) -> _Described:
    addresses, offsets = (torch.from_numpy(table) for table in (planes.addresses, planes.row_offsets))
    return _Described(planes, addresses.to(device), offsets.to(device))


def _tables(device: torch.device, ids: Tensor, chunks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and the chunks' addresses in the GPU's memory; what is not there yet goes in one copy."""
    addresses = np.fromiter((chunk.data_ptr() for chunk in chunks), np.int64, len(chunks))
    if ids.device == device and device.type == "cuda":
        aligned = ids if ids.is_contiguous() and not ids.data_ptr() % ALIGN_MAX else ids.clone()
        return aligned, _sent(torch.from_numpy(addresses), device)
    # Addresses first, of an even number: both begin at multiples of 16 bytes, as the kernel was compiled for.
    begin = len(addresses) + len(addresses) % 2
    table = torch.zeros(begin + len(ids), dtype=torch.int64)
    table[: len(addresses)] = torch.from_numpy(addresses)
    table[begin:] = ids
    sent = _sent(table, device)
    return sent[begin:], sent[: len(addresses)]


def _sent(table: Tensor, device: torch.device) -> Tensor:
    """From pinned memory, which torch keeps until the copy is over: the caller does not wait."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _current(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device; without a GPU (its interpreter) there is none."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
