"""The copies themselves, in the form that a layout has, on the lane of their direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vcache.engine.arguments import Transfer
from vcache.engine.lanes import Event, Lanes
from vcache.engine.stats import Counters
from vcache.kernels import LaunchOptions, gather_pages, gather_tokens, scatter_pages, scatter_tokens


class Copies:
    """Gathers and scatters of one engine. Thread-safe.

    stores, loads: the lanes; two, so that a load need not stand behind stores. options: of every launch.
    """

    def __init__(
        self,
        counters: Counters,
        options: LaunchOptions,
        stores: Lanes | None = None,
        loads: Lanes | None = None,
    ) -> None:
        self._counters = counters
        self._options = options
        self._stores = stores or Lanes()
        self._loads = loads or Lanes()

    def gather(self, transfer: Transfer, chunks: Sequence[Tensor]) -> None:
        """Copy paged KV into `chunks`, in one launch; when it returns the copy has really finished."""
        copy = gather_pages if transfer.paged.layout.form == "pages" else gather_tokens
        with self._counters.seconds("gather_seconds"):
            self._run(copy, self._stores, transfer, chunks, None).wait()

    def scatter(self, transfer: Transfer, chunks: Sequence[Tensor]) -> None:
        """Copy `chunks` into paged KV, in one launch; when it returns the copy has really finished."""
        with self._counters.seconds("scatter_seconds"):
            self.scatter_layers(transfer, chunks, None).wait()

    def brought(self, transfer: Transfer, chunk: Tensor) -> Tensor:
        """A copy of a chunk in host memory on the GPU of the paged KV, whose kernels cannot read it there."""
        copy = torch.empty(len(chunk), dtype=torch.uint8, device=transfer.paged.device)
        lane = self._loads.on(transfer.paged.device)
        lane.run(lambda: copy.copy_(chunk, non_blocking=True), transfer.after).wait()
        return copy

    def scatter_layers(self, transfer: Transfer, chunks: Sequence[Tensor], layers: range | None) -> Event:
        """Copy some layers of `chunks` into paged KV, in one launch; the event that they are there."""
        copy = scatter_pages if transfer.paged.layout.form == "pages" else scatter_tokens
        return self._run(copy, self._loads, transfer, chunks, layers)

    def _run(
        self,
        copy: Callable[..., None],
        lanes: Lanes,
        transfer: Transfer,
        chunks: Sequence[Tensor],
        layers: range | None,
    ) -> Event:
        lane = lanes.on(transfer.paged.device)
        return lane.run(
            lambda: copy(transfer.paged, transfer.ids, chunks, layers, self._options), transfer.after
        )
