"""Paged KV as vLLM has it, in host memory or on a GPU, whose every byte follows from the tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tests.processes.content import kv_of_tokens
from vcache.layout import KVLayout

PAGE_TOKENS = 16


class Shape(NamedTuple):
    """Of the KV of one engine. device: where it is ("cpu", "cuda:0"); parts: 2, or 1 for MLA."""

    device: str
    layers: int
    parts: int
    heads: int
    head_size: int
    slots: int

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size

    def empty(self) -> list[torch.Tensor]:
        """Per layer: in host memory [K/V, slot, hidden], which is what our connector takes; on a GPU what
        vLLM's attention backends have, [K/V, page, slot in it, head, dim] or [page, slot in it, dim].
        """
        shape: tuple[int, ...] = self.parts, self.slots, self.hidden
        if self.device != "cpu":
            pages = self.slots // PAGE_TOKENS
            shape = 2, pages, PAGE_TOKENS, self.heads, self.head_size
            if self.parts == 1:
                shape = pages, PAGE_TOKENS, self.hidden
        return [torch.zeros(shape, device=self.device) for _ in range(self.layers)]


class Paged:
    """Some tokens' places in paged KV, which is empty at first.

    kvcaches: LMCache's connector for GPUs goes on to use the first that it saw; None: others.
    """

    def __init__(self, shape: Shape, tokens: list[int], kvcaches: list[torch.Tensor] | None) -> None:
        layout = KVLayout(
            num_layers=shape.layers,
            num_kv_heads=shape.heads,
            head_size=shape.head_size,
            dtype="float32",
            kv_parts=shape.parts,
            chunk_tokens=PAGE_TOKENS,
        )
        self.tokens = tokens
        self._shape = shape
        self._expected = kv_of_tokens(tokens, layout).flatten(3).to(shape.device)
        self.kvcaches = shape.empty() if kvcaches is None else kvcaches
        self.slot_mapping = torch.randperm(shape.slots)[: len(tokens)].to(shape.device)
        for layer in self.kvcaches:
            layer.zero_()
        self.wait()

    def fill(self) -> Paged:
        """Put the tokens' KV there."""
        for layer, words in enumerate(self._words()):
            words[:, self.slot_mapping] = self._expected[layer]
        self.wait()
        return self

    def wrong(self, mask: torch.Tensor) -> int:
        """How many of the masked tokens have not what they should have."""
        self.wait()
        right = torch.ones(len(self.tokens), dtype=torch.bool, device=self._shape.device)
        for layer, words in enumerate(self._words()):
            right &= (words[:, self.slot_mapping] == self._expected[layer]).all(-1).all(0)
        return int((mask & ~right.cpu()).sum())

    def wait(self) -> None:
        """Until nothing copies any more, on whatever stream."""
        if self._shape.device != "cpu":
            torch.cuda.synchronize(self._shape.device)

    def given(self) -> dict[str, Any]:
        """What LMCache's calls want. sync: whether layer-wise copies are waited for; vLLM has it so only for
        one request of a step, and we must bear it.
        """
        return {"kvcaches": self.kvcaches, "slot_mapping": self.slot_mapping, "sync": False}

    def _words(self) -> list[torch.Tensor]:
        """Per layer [K/V, slot, word], over the memory itself."""
        shape = self._shape
        return [
            layer.view(shape.parts, shape.slots, shape.hidden).view(torch.int32) for layer in self.kvcaches
        ]
