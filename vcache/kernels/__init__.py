"""Gather (paged KV → chunks) and scatter (chunks → paged KV), behind plain functions that choose by device.

`reference` is the definition; what is chosen here equals it bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial

from torch import Tensor

from vcache.kernels import cpu, reference
from vcache.kernels.base import PagedKV
from vcache.kernels.checks import check_chunks, check_form, check_layers, check_pages, check_slots
from vcache.kernels.launch import NO_LIMIT, LaunchOptions

__all__ = [
    "NO_LIMIT",
    "LaunchOptions",
    "PagedKV",
    "check_pages",
    "check_slots",
    "gather_pages",
    "gather_tokens",
    "prepare",
    "scatter_pages",
    "scatter_tokens",
]


_log = logging.getLogger(__name__)


def gather_tokens(
    paged: PagedKV,
    slots: Tensor,
    chunks: Sequence[Tensor],
    layers: range | None = None,
    options: LaunchOptions = NO_LIMIT,
) -> None:
    """Copy the tokens at `slots` into `chunks`, in order; tokens whose slot is -1 become zeros.

    slots: int64, one per token of the chunks, in any order. chunks: contiguous 1-D uint8 tensors of
    `chunk_bytes` each, the last one perhaps of fewer whole tokens; they are in the tokens form and must not
    overlap. layers: a range of layers, to copy only these; all by default. options: for GPUs. On a GPU the
    copy is one launch, ordered on the current stream. Raises ArgumentError before anything is copied.
    """
    check_form(paged, "tokens")
    check_slots(paged, slots, check_chunks(paged, chunks, paged.layout.token_bytes))
    check_layers(paged, layers)
    _kernels(paged, options)[0](paged, slots, chunks, layers)


def scatter_tokens(
    paged: PagedKV,
    slots: Tensor,
    chunks: Sequence[Tensor],
    layers: range | None = None,
    options: LaunchOptions = NO_LIMIT,
) -> None:
    """Copy `chunks`, in order, to the tokens at `slots`; those whose slot is -1 are skipped.

    Arguments as for `gather_tokens`. Which token stays where a slot comes twice is not defined.
    """
    check_form(paged, "tokens")
    check_slots(paged, slots, check_chunks(paged, chunks, paged.layout.token_bytes))
    check_layers(paged, layers)
    _kernels(paged, options)[1](paged, slots, chunks, layers)


def gather_pages(
    paged: PagedKV,
    pages: Tensor,
    chunks: Sequence[Tensor],
    layers: range | None = None,
    options: LaunchOptions = NO_LIMIT,
) -> None:
    """Copy whole pages, verbatim, into `chunks`, in order; pages given as -1 become zeros.

    pages: int64, one per page of the chunks, in any order. chunks: contiguous 1-D uint8 tensors of
    `chunk_bytes` each, the last one perhaps of fewer pages; they are in the pages form and must not overlap.
    layers, options, order on a GPU and errors as for `gather_tokens`.
    """
    check_form(paged, "pages")
    check_pages(paged, pages, check_chunks(paged, chunks, reference.unit_bytes(paged)))
    check_layers(paged, layers)
    _kernels(paged, options)[0](paged, pages, chunks, layers)


def scatter_pages(
    paged: PagedKV,
    pages: Tensor,
    chunks: Sequence[Tensor],
    layers: range | None = None,
    options: LaunchOptions = NO_LIMIT,
) -> None:
    """Copy `chunks`, in order, over whole pages; pages given as -1 are skipped.

    Arguments as for `gather_pages`. Which page stays where one comes twice is not defined.
    """
    check_form(paged, "pages")
    check_pages(paged, pages, check_chunks(paged, chunks, reference.unit_bytes(paged)))
    check_layers(paged, layers)
    _kernels(paged, options)[1](paged, pages, chunks, layers)


def prepare(paged: PagedKV) -> None:
    """Have all that a first copy would have to make: on a GPU the compiled kernels. Waits for it.

    To be called when paged KV is registered, and never while a graph is captured.
    """
    if paged.device.type == "cuda" and _has_triton():
        from vcache.kernels import gpu

        gpu.prepare(paged)


_Kernel = Callable[[PagedKV, Tensor, Sequence[Tensor], "range | None"], None]


def _kernels(paged: PagedKV, options: LaunchOptions) -> tuple[_Kernel, _Kernel]:
    """Gather and scatter for where the paged KV lies."""
    if paged.device.type == "cpu":
        return cpu.gather, cpu.scatter
    if paged.device.type == "cuda" and _has_triton():
        from vcache.kernels import gpu

        return partial(gpu.gather, options=options), partial(gpu.scatter, options=options)
    return reference.gather, reference.scatter


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401  # only whether it is there
    except ImportError as error:
        _log.warning("copies on GPUs go through plain torch and are many times slower: no Triton (%s)", error)
        return False
    return True
