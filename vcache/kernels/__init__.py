"""Gather (paged KV → chunks) and scatter (chunks → paged KV), behind plain functions that choose by device.

`reference` is the definition; what is chosen here equals it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from vcache.kernels import cpu, reference
from vcache.kernels.base import PagedKV
from vcache.kernels.checks import check_chunks, check_form, check_pages, check_slots

__all__ = [
    "PagedKV",
    "check_pages",
    "check_slots",
    "gather_pages",
    "gather_tokens",
    "scatter_pages",
    "scatter_tokens",
]


def gather_tokens(paged: PagedKV, slots: Tensor, chunks: Sequence[Tensor]) -> None:
    """Copy the tokens at `slots` into `chunks`, in order; tokens whose slot is -1 become zeros.

    slots: int64, one per token of the chunks, in any order. chunks: contiguous 1-D uint8 tensors of
    `chunk_bytes` each, the last one perhaps of fewer whole tokens; they are in the tokens form and must not
    overlap. On a GPU the copy is ordered on the current stream. Raises ArgumentError before anything is
    copied.
    """
    check_form(paged, "tokens")
    check_slots(paged, slots, check_chunks(paged, chunks, paged.layout.token_bytes))
    _kernels(paged)[0](paged, slots, chunks)


def scatter_tokens(paged: PagedKV, slots: Tensor, chunks: Sequence[Tensor]) -> None:
    """Copy `chunks`, in order, to the tokens at `slots`; those whose slot is -1 are skipped.

    Arguments as for `gather_tokens`. Which token stays where a slot comes twice is not defined.
    """
    check_form(paged, "tokens")
    check_slots(paged, slots, check_chunks(paged, chunks, paged.layout.token_bytes))
    _kernels(paged)[1](paged, slots, chunks)


def gather_pages(paged: PagedKV, pages: Tensor, chunks: Sequence[Tensor]) -> None:
    """Copy whole pages, verbatim, into `chunks`, in order; pages given as -1 become zeros.

    pages: int64, one per page of the chunks, in any order. chunks: contiguous 1-D uint8 tensors of
    `chunk_bytes` each, the last one perhaps of fewer pages; they are in the pages form and must not overlap.
    On a GPU the copy is ordered on the current stream. Raises ArgumentError before anything is copied.
    """
    check_form(paged, "pages")
    check_pages(paged, pages, check_chunks(paged, chunks, reference.unit_bytes(paged)))
    _kernels(paged)[0](paged, pages, chunks)


def scatter_pages(paged: PagedKV, pages: Tensor, chunks: Sequence[Tensor]) -> None:
    """Copy `chunks`, in order, over whole pages; pages given as -1 are skipped.

    Arguments as for `gather_pages`. Which page stays where one comes twice is not defined.
    """
    check_form(paged, "pages")
    check_pages(paged, pages, check_chunks(paged, chunks, reference.unit_bytes(paged)))
    _kernels(paged)[1](paged, pages, chunks)


_Kernel = Callable[[PagedKV, Tensor, Sequence[Tensor]], None]


def _kernels(paged: PagedKV) -> tuple[_Kernel, _Kernel]:
    """Gather and scatter for where the paged KV lies."""
    if paged.device.type == "cpu":
        return cpu.gather, cpu.scatter
    return reference.gather, reference.scatter
