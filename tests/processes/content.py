"""KV whose every byte follows from the prompt, so that a reader can check what it was served."""

from __future__ import annotations

import numpy as np
import torch

from vcache.layout import KVLayout

LAYOUT = KVLayout(
    num_layers=3, num_kv_heads=2, head_size=8, dtype="float32", kv_parts=2, chunk_tokens=16, form="tokens"
)
"""6 KiB a chunk (extents of 8 KiB): small enough to evict thousands in a test."""

PAGE_TOKENS = 8
AXES = "kpshd"


def prompt(seed: int, count: int) -> list[int]:
    """Tokens of the prompt `seed`; prompts share nothing."""
    return [seed * 1_000_003 + position for position in range(count)]


def kv_of(seed: int, count: int, layout: KVLayout = LAYOUT) -> torch.Tensor:
    """The KV of a prompt: int32 words [layer, K/V, token, head, head_size], no two tokens alike."""
    shape = (layout.num_layers, layout.kv_parts, count, layout.num_kv_heads, layout.head_size)
    inside = np.arange(np.prod(shape[3:]), dtype=np.uint64)
    where = (np.arange(shape[0] * shape[1], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).reshape(
        -1, 1, 1
    )
    tokens = np.array(prompt(seed, count), np.uint64).reshape(1, -1, 1) * np.uint64(0xD1B54A32D192ED03)
    words = (tokens + where + inside * np.uint64(0x94D049BB133111EB)) >> np.uint64(31)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32)).reshape(shape)


class PagedPrompt:
    """Paged KV with room for one prompt, its slots shuffled."""

    def __init__(self, seed: int, count: int, layout: KVLayout = LAYOUT) -> None:
        self.tokens = prompt(seed, count)
        self._expected = kv_of(seed, count, layout)
        pages = -(-count // PAGE_TOKENS) + 2
        order = np.random.default_rng(seed).permutation(pages * PAGE_TOKENS)[:count]
        self.slots = torch.from_numpy(order.astype(np.int64))
        shape = (layout.kv_parts, pages, PAGE_TOKENS, layout.num_kv_heads, layout.head_size)
        self.kvcaches = [torch.full(shape, -1.0, dtype=torch.float32) for _ in range(layout.num_layers)]

    def _rows(self, layer: int, part: int) -> torch.Tensor:
        return self.kvcaches[layer].view(torch.int32)[part].flatten(0, 1)

    def fill(self) -> PagedPrompt:
        """Write the prompt's KV into the pages, as a model would."""
        for layer in range(len(self.kvcaches)):
            for part in range(self._expected.shape[1]):
                self._rows(layer, part)[self.slots] = self._expected[layer, part]
        return self

    def wrong_tokens(self, mask: torch.Tensor) -> int:
        """How many of the tokens under `mask` do not have the prompt's KV."""
        right = torch.ones(len(self.tokens), dtype=torch.bool)
        for layer in range(len(self.kvcaches)):
            for part in range(self._expected.shape[1]):
                found = self._rows(layer, part)[self.slots]
                right &= (found == self._expected[layer, part]).flatten(1).all(1)
        return int((mask & ~right).sum())
