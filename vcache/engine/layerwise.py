"""Layer by layer: the same chunks and pages, so that a reader can begin with the first."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from torch import Tensor

from vcache.engine.arguments import Transfer
from vcache.errors import ArgumentError
from vcache.kernels import PagedKV


class Layers:
    """One description for each layer of a paged KV cache; a chunk's layers lie one after the other."""

    def __init__(self, paged: PagedKV) -> None:
        """Describe them. Raises ArgumentError for layers that only the tokens form knows apart."""
        layout = paged.layout
        if layout.form != "pages":
            raise ArgumentError("layout.form", repr(layout.form), "'pages'")
        single = msgspec.structs.replace(layout, num_layers=1)
        self._parts = [PagedKV(single, [layer], paged.page_tokens, paged.page_axes) for layer in paged.layers]

    def __len__(self) -> int:
        return len(self._parts)

    def part(self, transfer: Transfer, chunks: Sequence[Tensor], layer: int) -> tuple[Transfer, list[Tensor]]:
        """A layer of a transfer, and that part of each of its chunks."""
        count = len(self._parts)
        sizes = [size // count for size in transfer.sizes]
        part = Transfer(self._parts[layer], transfer.keys, sizes, transfer.ids, transfer.ids_per_chunk)
        places = zip(chunks, sizes, strict=True)
        return part, [chunk[layer * size : (layer + 1) * size] for chunk, size in places]
