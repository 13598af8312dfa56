"""The copies themselves, in the form that a layout has."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vcache.engine.arguments import Transfer
from vcache.engine.stats import Counters
from vcache.kernels import gather_pages, gather_tokens, scatter_pages, scatter_tokens


def gather(transfer: Transfer, chunks: Sequence[Tensor], counters: Counters) -> None:
    """Copy paged KV into `chunks`, in one launch; when it returns the copy has really finished."""
    copy = gather_pages if transfer.paged.layout.form == "pages" else gather_tokens
    with counters.seconds("gather_seconds"):
        copy(transfer.paged, transfer.ids, chunks)
        _finish(transfer)


def scatter(transfer: Transfer, chunks: Sequence[Tensor], counters: Counters) -> None:
    """Copy `chunks` into paged KV, in one launch; when it returns the copy has really finished."""
    copy = scatter_pages if transfer.paged.layout.form == "pages" else scatter_tokens
    with counters.seconds("scatter_seconds"):
        copy(transfer.paged, transfer.ids, chunks)
        _finish(transfer)


def _finish(transfer: Transfer) -> None:
    """Wait for the copy: on a GPU it is only ordered on the current stream."""
    if transfer.paged.device.type == "cuda":
        import torch

        torch.cuda.current_stream(transfer.paged.device).synchronize()
