"""KV whose every byte follows from the prompt, so that a reader can check what it was served."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from vcache.layout import KVLayout

LAYOUT = KVLayout(
    num_layers=3, num_kv_heads=2, head_size=8, dtype="float32", kv_parts=2, chunk_tokens=16, form="tokens"
)
"""6 KiB a chunk (extents of 8 KiB): small enough to evict thousands in a test."""

LARGE_LAYOUT = KVLayout(
    num_layers=3, num_kv_heads=2, head_size=164, dtype="float32", kv_parts=2, chunk_tokens=16, form="tokens"
)
"""The same, but 123 KiB a chunk (extents of 124 KiB): 16 fill 2 MiB, the smallest segment that a GPU has."""

PAGE_TOKENS = 8
AXES = "kpshd"

PAGES_LAYOUT = KVLayout(
    num_layers=3,
    num_kv_heads=2,
    head_size=8,
    dtype="float32",
    kv_parts=2,
    chunk_tokens=16,
    form="pages",
    page_tokens=PAGE_TOKENS,
    page_bytes=2 * PAGE_TOKENS * 2 * 8 * 4,
    page_format="tests axes=kshd",
)
"""The same chunks as verbatim pages; the paged tensors are spelled "pkshd"."""

PAGES_AXES = "pkshd"


def prompt(seed: int, count: int) -> list[int]:
    """Tokens of the prompt `seed`; prompts share nothing."""
    return [seed * 1_000_003 + position for position in range(count)]


def kv_of_tokens(tokens: list[int], layout: KVLayout = LAYOUT) -> torch.Tensor:
    """The KV of some tokens: int32 words [layer, K/V, token, head, head_size], no two tokens alike."""
    shape = (layout.num_layers, layout.kv_parts, len(tokens), layout.num_kv_heads, layout.head_size)
    inside = np.arange(np.prod(shape[3:]), dtype=np.uint64)
    where = (np.arange(shape[0] * shape[1], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).reshape(
        -1, 1, 1
    )
    each = np.array(tokens, np.uint64).reshape(1, -1, 1) * np.uint64(0xD1B54A32D192ED03)
    words = (each + where + inside * np.uint64(0x94D049BB133111EB)) >> np.uint64(31)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32)).reshape(shape)


def kv_of(seed: int, count: int, layout: KVLayout = LAYOUT) -> torch.Tensor:
    """The KV of a prompt, as `kv_of_tokens`."""
    return kv_of_tokens(prompt(seed, count), layout)


def page_key(token: int) -> bytes:
    """A chunk key as a connector would bring one of its own: here from the chunk's first token."""
    return hashlib.sha256(token.to_bytes(8, "little")).digest()


class PagedTokens:
    """Paged KV with room for some tokens: the slots are shuffled, in the pages form the pages."""

    def __init__(self, tokens: list[int], layout: KVLayout = LAYOUT, *, device: str = "cpu") -> None:
        self.tokens = tokens
        self._expected = kv_of_tokens(tokens, layout).to(device)
        count = -(-len(tokens) // PAGE_TOKENS) + 2
        shape = [layout.kv_parts, count, PAGE_TOKENS, layout.num_kv_heads, layout.head_size]
        is_paged = layout.form == "pages"
        if is_paged:
            shape[:2] = count, layout.kv_parts
        self.kvcaches = [
            torch.full(shape, -1.0, dtype=torch.float32, device=device) for _ in range(layout.num_layers)
        ]
        self._views = [tensor.transpose(0, 1) if is_paged else tensor for tensor in self.kvcaches]
        rng = np.random.default_rng(tokens[0])
        self.pages = torch.from_numpy(rng.permutation(count)[: len(tokens) // PAGE_TOKENS])
        if is_paged:
            slots = (self.pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten()
        else:
            slots = torch.from_numpy(rng.permutation(count * PAGE_TOKENS)[: len(tokens)])
        self.slots = slots.to(torch.int64)
        self.keys = [page_key(token) for token in tokens[:: layout.chunk_tokens]]

    def _at(self, layer: int, part: int) -> tuple[torch.Tensor, ...]:
        """The words of one layer's K or V, [page, slot, …], and where in it the tokens are."""
        words = self._views[layer].view(torch.int32)[part]
        slots = self.slots.to(words.device)
        return words, slots // PAGE_TOKENS, slots % PAGE_TOKENS

    def fill(self) -> PagedTokens:
        """Write the tokens' KV into the pages, as a model would."""
        for layer in range(len(self.kvcaches)):
            for part in range(self._expected.shape[1]):
                words, page, slot = self._at(layer, part)
                words[page, slot] = self._expected[layer, part]
        return self

    def wrong_tokens(self, mask: torch.Tensor) -> int:
        """How many of the tokens under `mask` do not have their KV."""
        right = torch.ones(len(self.tokens), dtype=torch.bool)
        for layer in range(len(self.kvcaches)):
            for part in range(self._expected.shape[1]):
                words, page, slot = self._at(layer, part)
                right &= (words[page, slot] == self._expected[layer, part]).flatten(1).all(1).cpu()
        return int((mask & ~right).sum())


class PagedPrompt(PagedTokens):
    """Paged KV with room for the prompt `seed` of `count` tokens."""

    def __init__(self, seed: int, count: int, layout: KVLayout = LAYOUT, *, device: str = "cpu") -> None:
        super().__init__(prompt(seed, count), layout, device=device)
