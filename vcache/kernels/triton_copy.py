"""The one kernel of gather and scatter on a GPU: words between paged KV and chunks, by tables of addresses.

Own memory and peers' are alike to it, and so are all layers and chunks of a call: one launch moves
everything.

A **plane** is one layer's K or V (a layer, in the pages form). In every plane a **unit** (a token or a page)
is `ROWS` rows of `WORDS` words each, contiguous in the chunk, and in paged memory at the unit's address plus
an offset per row. Programs take tiles of BLOCK words of one plane, in turn, until none is left, so any number
of programs does the whole work: that is how copies can be kept off most of a GPU.

What the layout fixes is a constant of the compiled kernel; what changes from call to call
(`do_not_specialize`) never makes Triton compile another one. `ALIGN` promises that addresses and strides are
multiples of so many bytes, and makes the accesses 16 bytes wide.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

_OF_A_CALL: Final = ["first_plane", "units", "tiles", "plane_tiles", "last_chunk", "last_units"]


@triton.jit(do_not_specialize=_OF_A_CALL)  # type: ignore[untyped-decorator]  # Triton has no types
def copy_words(  # type: ignore[no-untyped-def]
    ids,
    chunks,
    planes,
    row_offsets,
    first_plane,
    units,
    tiles,
    plane_tiles,
    last_chunk,
    last_units,
    TO_CHUNKS: tl.constexpr,  # noqa: N803  # constants of a kernel are written so
    WORD: tl.constexpr,  # noqa: N803
    ALIGN: tl.constexpr,  # noqa: N803
    UNITS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
    SLOTS: tl.constexpr,  # noqa: N803
    PAGE_STRIDE: tl.constexpr,  # noqa: N803
    SLOT_STRIDE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Copy `units` units of the planes from `first_plane` on: into the chunks (TO_CHUNKS), or out of them.

    ids: int64, a slot or page per unit; -1 is written as zeros, and not read. chunks, planes: int64
    addresses. row_offsets: int64, in words, ROWS of them. tiles: in all planes; plane_tiles: in each. Every
    chunk has UNITS units, but `last_chunk`, the last one, has `last_units`. SLOTS: in a page (1: ids are
    pages). PAGE_STRIDE, SLOT_STRIDE: in words.
    """
    unit_words: tl.constexpr = ROWS * WORDS
    word_bytes: tl.constexpr = WORD.primitive_bitwidth // 8
    # So many neighbours, a power of two, lie in the same row, and so many are of the same unit.
    row_run: tl.constexpr = min(WORDS & -WORDS, BLOCK)
    unit_run: tl.constexpr = min(unit_words & -unit_words, BLOCK)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        plane = first_plane + tile // plane_tiles
        at = tile % plane_tiles * BLOCK + tl.arange(0, BLOCK)
        unit = at // unit_words
        inside = at % unit_words
        is_there = unit < units
        number = tl.load(ids + unit, mask=is_there, other=-1)
        is_kept = number >= 0

        begin = number // SLOTS * PAGE_STRIDE + number % SLOTS * SLOT_STRIDE
        if ROWS > 1:
            begin += tl.load(row_offsets + inside // WORDS)
        row = (tl.load(planes + plane) + begin * word_bytes).to(tl.pointer_type(WORD))
        paged_at = tl.max_constancy(tl.multiple_of(row, ALIGN), row_run) + at % WORDS

        chunk_number = unit // UNITS
        chunk_units = tl.where(chunk_number == last_chunk, last_units, UNITS).to(tl.int64)
        begin_in_chunk = (plane * chunk_units + unit % UNITS) * unit_words * word_bytes
        chunk = tl.load(chunks + chunk_number, mask=is_there, other=0) + begin_in_chunk
        chunk = tl.max_constancy(tl.multiple_of(chunk.to(tl.pointer_type(WORD)), ALIGN), unit_run)
        chunk_at = chunk + inside

        if TO_CHUNKS:
            tl.store(chunk_at, tl.load(paged_at, mask=is_kept, other=0), mask=is_there)
        else:
            tl.store(paged_at, tl.load(chunk_at, mask=is_kept, other=0), mask=is_kept)
