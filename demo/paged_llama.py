"""A small Llama (transformers' own classes, seeded weights) with a paged KV cache of ours.

The way of vLLM's transformers backend: an attention function, registered under a name of its own, gets the
new tokens' keys and values, writes them to slots, and attends to what the sequence's page table names. No
cache of transformers is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

PAGE_TOKENS: Final = 16
"""Slots in one page, as in vLLM."""

STEP_TOKENS: Final = 128
"""Prompt tokens computed in one step, and also the tokens of one chunk: a run that starts behind a hit then
does the very same arithmetic as one that starts at 0, so both can be compared exactly."""

ATTENTION: Final = "vcache_demo_paged"

LAYERS: Final = 6
HEADS: Final = 8
KV_HEADS: Final = 4
HEAD_SIZE: Final = 64
GROUP: Final = HEADS // KV_HEADS


def model_config(attention: str = ATTENTION) -> Any:
    """Return the `LlamaConfig` of the demo: 14 million parameters, 12 KiB of KV per token in float32."""
    options: dict[str, Any] = {
        "attn_implementation": attention,
        "vocab_size": 256,
        "hidden_size": HEADS * HEAD_SIZE,
        "intermediate_size": 1024,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": 8192,
        "initializer_range": 0.06,  # not the usual 0.02: sharper attention, so that a wrong chunk shows
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
    }
    return LlamaConfig(**options)


def make_model(seed: int = 0, attention: str = ATTENTION) -> Any:
    """Return a `LlamaForCausalLM` with random float32 weights, equal in every process with the same seed."""
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(model_config(attention))
    return model.float().eval()


@dataclass(frozen=True)
class Step:
    """One forward pass: where its keys and values go, and what they attend to."""

    layers: list[torch.Tensor]
    slots: torch.Tensor  # (new tokens,) int64: where their keys and values are written
    pages: torch.Tensor  # pages of the whole context, in the order of its tokens
    context_tokens: int  # tokens attended to, the new ones included
    visible: torch.Tensor | None  # (GROUP * new tokens, context) bool; None when every token is visible


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    step: Step,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write `key` and `value` (1, KV heads, tokens, head size) to their slots; attend to the step's pages.

    Returns (1, tokens, heads, head size). `query` is (1, heads, tokens, head size).
    """
    layer = step.layers[module.layer_idx]  # type: ignore[index]
    flat = layer.flatten(1, 2)
    flat[0].index_copy_(0, step.slots, key[0].transpose(0, 1))
    flat[1].index_copy_(0, step.slots, value[0].transpose(0, 1))
    context = layer.index_select(1, step.pages).flatten(1, 2)[:, : step.context_tokens]
    keys, values = context.transpose(1, 2)  # (KV heads, context, head size) each
    tokens = query.shape[2]
    grouped = query.reshape(1, KV_HEADS, GROUP * tokens, HEAD_SIZE)
    output = scaled_dot_product_attention(
        grouped, keys[None], values[None], attn_mask=step.visible, scale=scaling
    )
    return output.reshape(1, HEADS, tokens, HEAD_SIZE).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, paged_attention)


class PagedKV:
    """The paged KV cache of one worker, in vLLM's NHD layout.

    Per layer one float32 tensor (K/V, pages, page tokens, KV heads, head size): axes "kpshd".
    """

    def __init__(self, pages: int) -> None:
        shape = (2, pages, PAGE_TOKENS, KV_HEADS, HEAD_SIZE)
        self.layers = [torch.empty(shape, dtype=torch.float32) for _ in range(LAYERS)]
        self.pages = pages
        self.generator = torch.Generator().manual_seed(1)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token over all layers."""
        return sum(layer[:, 0, 0].nbytes for layer in self.layers)

    def fresh_sequence(self, tokens_max: int) -> PagedSequence:
        """Return a sequence of at most `tokens_max` tokens on randomly chosen pages; ValueError without room.

        The whole cache is filled with NaN first: a token neither retrieved nor computed ruins the answer.
        """
        wanted = -(-tokens_max // PAGE_TOKENS)
        if wanted > self.pages:
            raise ValueError(f"tokens_max: got {tokens_max}, wanted at most {self.pages * PAGE_TOKENS}")
        for layer in self.layers:
            layer.fill_(float("nan"))
        return PagedSequence(self, torch.randperm(self.pages, generator=self.generator)[:wanted])


class PagedSequence:
    """One sequence's page table: token t lies in page `pages[t // PAGE_TOKENS]`."""

    def __init__(self, kv: PagedKV, pages: torch.Tensor) -> None:
        self.kv = kv
        self.pages = pages

    def slot_mapping(self, start: int, end: int) -> torch.Tensor:
        """Return the slot of each token of [start, end): (end - start,) int64."""
        positions = torch.arange(start, end)
        return self.pages[positions // PAGE_TOKENS] * PAGE_TOKENS + positions % PAGE_TOKENS

    def contents(self, tokens: int) -> torch.Tensor:
        """Return a copy of the first tokens' KV in their order: (layers, 2, tokens, KV heads, head size)."""
        slots = self.slot_mapping(0, tokens)
        return torch.stack([layer.flatten(1, 2).index_select(1, slots) for layer in self.kv.layers])

    def step(self, start: int, end: int) -> Step:
        """Return the step that computes the tokens of [start, end)."""
        visible = None
        if end - start > 1:
            causal = torch.arange(end)[None, :] <= torch.arange(start, end)[:, None]
            visible = causal.repeat(GROUP, 1)
        pages = self.pages[: -(-end // PAGE_TOKENS)]
        return Step(self.kv.layers, self.slot_mapping(start, end), pages, end, visible)


@torch.inference_mode()
def forward(model: Any, sequence: PagedSequence, tokens: list[int], start: int, end: int) -> int:
    """Compute the KV of `tokens[start:end]` behind what the pages hold; return the likeliest next token."""
    step = sequence.step(start, end)
    output = model(
        input_ids=torch.tensor([tokens[start:end]]),
        position_ids=torch.arange(start, end)[None],
        logits_to_keep=1,
        step=step,
    )
    logits = output.logits[0, -1]
    if not bool(torch.isfinite(logits).all()):
        raise FloatingPointError(
            f"logits are not finite after tokens {start} to {end}: pages were read that nobody wrote"
        )
    return int(logits.argmax())


def generate(
    model: Any,
    sequence: PagedSequence,
    prompt: list[int],
    cached_tokens: int,
    answer_tokens: int,
) -> Iterator[int]:
    """Yield `answer_tokens` tokens, greedily; the pages hold the KV of `prompt[:cached_tokens]` already.

    `cached_tokens` must leave one token to compute: the first answer token comes from its logits.
    """
    if not 0 <= cached_tokens < len(prompt):
        raise ValueError(f"cached_tokens: got {cached_tokens}, wanted 0 to {len(prompt) - 1}")
    tokens, done, following = list(prompt), cached_tokens, -1
    while done < len(prompt):
        end = min(done + STEP_TOKENS, len(prompt))
        following = forward(model, sequence, tokens, done, end)
        done = end
    yield following
    for _ in range(answer_tokens - 1):
        tokens.append(following)
        following = forward(model, sequence, tokens, len(tokens) - 1, len(tokens))
        yield following
