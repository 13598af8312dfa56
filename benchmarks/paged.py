"""What the benchmarks of the engine move: Llama-3-8B's KV, paged in two orders, in a peer's segment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from benchmarks.processes import Pool
from vcache.bench.copy import LLAMA3_8B, Order, slots_of
from vcache.segment import DATA_OFFSET

LAYOUT: Final = LLAMA3_8B
CHUNKS: Final = 8
TOKENS: Final = CHUNKS * LAYOUT.chunk_tokens
BYTES: Final = CHUNKS * LAYOUT.chunk_bytes
PAGE_TOKENS: Final = 16
PAGES: Final = TOKENS // PAGE_TOKENS
"""Pages that the chunks need."""

PEER: Final = "shm:1"
ORDERS: Final[tuple[Order, ...]] = ("pages", "random-pages")


class Paged:
    """Paged KV of at least PAGES pages, all of its memory there, no two pages alike."""

    def __init__(self, pages: int) -> None:
        shape = (LAYOUT.kv_parts, pages, PAGE_TOKENS, LAYOUT.num_kv_heads, LAYOUT.head_size)
        count = shape[0] * shape[1]
        self.kvcaches = []
        for layer in range(LAYOUT.num_layers):
            numbers = torch.arange(layer * count, (layer + 1) * count, dtype=torch.int16)
            filled = numbers.view(torch.bfloat16).reshape(*shape[:2], 1, 1, 1).expand(shape)
            self.kvcaches.append(filled.clone(memory_format=torch.contiguous_format))
        self.slots = {order: slots_of(order, pages, PAGE_TOKENS, TOKENS) for order in ORDERS}

    def pages(self, layer: int, order: Order) -> Tensor:
        """A copy of the pages of one layer that hold the tokens, as int16."""
        ids = self.slots[order][::PAGE_TOKENS] // PAGE_TOKENS
        return self.kvcaches[layer].view(torch.int16)[:, ids]

    def wipe(self, layer: int, order: Order) -> None:
        """Overwrite those pages."""
        ids = self.slots[order][::PAGE_TOKENS] // PAGE_TOKENS
        self.kvcaches[layer].view(torch.int16)[:, ids] = -1


@contextmanager
def peer_pool(chunks: int) -> Iterator[Pool]:
    """A pool whose only segment is another process', with room for `chunks` chunks."""
    with Pool() as pool:
        pool.start_server()
        pool.start_holder(PEER, DATA_OFFSET + chunks * LAYOUT.chunk_bytes)
        yield pool
