"""What is shared and what is refused, by vLLM's own classes, and how tensors become pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import ModelConfig, PoolerConfig
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from integration.vllm.groups import Group, _group, _window_tokens, check_model, read_groups
from integration.vllm.tensors import describe_pages, page_bytes
from vcache.errors import ConfigError
from vcache.kernels import gather_pages, scatter_pages

SHAPE: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
BLOCKS, HEADS, TOKENS, WIDTH = 5, 2, 16, 64


def test_a_window_is_what_layers_look_back_at() -> None:
    assert _window_tokens(0, FullAttentionSpec(**SHAPE)) == 0
    assert _window_tokens(0, MLAAttentionSpec(**SHAPE)) == 0
    assert _window_tokens(0, SlidingWindowSpec(**SHAPE, sliding_window=64)) == 63


@pytest.mark.parametrize(
    "spec",
    [
        MambaSpec(block_size=16, shapes=((2, 3),), dtypes=(torch.float32,)),
        ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=32),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_state_that_is_not_the_kv_of_tokens_is_refused_in_words(spec: Any) -> None:
    with pytest.raises(ConfigError, match=f"KV group 3: got {type(spec).__name__}, wanted full attention"):
        _window_tokens(3, spec)


@pytest.mark.parametrize("together", [True, False])
def test_layers_that_look_ahead_are_refused_in_words(together: bool) -> None:
    causal, ahead = FullAttentionSpec(**SHAPE), FullAttentionSpec(**SHAPE, non_causal=True)
    both = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"first": causal, "second": ahead})
    grouped: Any = SimpleNamespace(kv_cache_spec=both if together else ahead, layer_names=["first", "second"])
    with pytest.raises(
        ConfigError, match=r"KV group 3: got layers that look ahead .*wanted causal attention"
    ):
        _group(3, grouped)


@pytest.mark.parametrize("pooling", ["MEAN", "CLS"])
def test_pooling_that_needs_all_tokens_is_refused_in_words(model: Callable[..., Path], pooling: Any) -> None:
    path = str(model("llama"))
    pooled = ModelConfig(
        model=path,
        skip_tokenizer_init=True,
        runner="pooling",
        convert="embed",
        pooler_config=PoolerConfig(seq_pooling_type=pooling),
    )
    with pytest.raises(ConfigError, match=f"pooler_config: got {pooling} and .*wanted .*LAST"):
        read_groups(SimpleNamespace(model_config=pooled), None, 0)


def test_pooling_of_the_last_token_and_generation_are_served(model: Callable[..., Path]) -> None:
    path = str(model("llama"))
    check_model(ModelConfig(model=path, skip_tokenizer_init=True))
    check_model(
        ModelConfig(
            model=path,
            skip_tokenizer_init=True,
            runner="pooling",
            convert="embed",
            pooler_config=PoolerConfig(seq_pooling_type="LAST"),
        )
    )


def test_diffusion_is_refused_in_words(model: Callable[..., Path]) -> None:
    diffusing = ModelConfig(
        model=str(model("llama")), skip_tokenizer_init=True, hf_overrides={"canvas_length": 32}
    )
    with pytest.raises(ConfigError, match=r"model: got .*a diffusion model"):
        read_groups(SimpleNamespace(model_config=diffusing), None, 0)


def group(*layers: str) -> Group:
    """A group of full attention."""
    return Group(0, TOKENS, 0, layers, FullAttentionSpec(**SHAPE))


def layer_compact(layers: int) -> dict[str, torch.Tensor]:
    """One tensor per layer: [block, head, token, K‖V]."""
    names = [f"layers.{number}" for number in range(layers)]
    return {name: torch.randn(BLOCKS, HEADS, TOKENS, WIDTH).to(torch.bfloat16) for name in names}


def across_layers(layers: int, padding: int = 0) -> dict[str, torch.Tensor]:
    """One tensor for all layers, a block of all of them together: [block, layer, head, token, K‖V]."""
    raw = torch.randn(BLOCKS, layers * HEADS * TOKENS * WIDTH + padding).to(torch.bfloat16)
    size = HEADS * TOKENS * WIDTH
    views = [raw[:, at * size : (at + 1) * size].view(BLOCKS, HEADS, TOKENS, WIDTH) for at in range(layers)]
    return {f"layers.{number}": view for number, view in enumerate(views)}


@pytest.mark.parametrize(
    ("tensors", "pieces"),
    [(layer_compact(3), 3), (across_layers(3), 1), (across_layers(3, padding=64), 1), (across_layers(1), 1)],
    ids=["layer by layer", "across layers", "across layers, padded", "one layer"],
)
def test_pages_travel_verbatim_in_the_largest_pieces(tensors: dict[str, torch.Tensor], pieces: int) -> None:
    described = describe_pages(
        group(*tensors), tensors, num_blocks=BLOCKS, chunk_tokens=2 * TOKENS, page_format="x"
    )
    assert len(described.paged.layers) == pieces
    assert described.layer_names == tuple(tensors)
    chunk = torch.zeros(described.paged.layout.chunk_bytes, dtype=torch.uint8)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    gather_pages(described.paged, torch.tensor([1, 3]), [chunk])
    for tensor in tensors.values():
        tensor[3] = 0
    scatter_pages(described.paged, torch.tensor([-1, 3]), [chunk])
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_layers_that_share_their_kv_count_once() -> None:
    tensors = layer_compact(2)
    tensors["layers.9"] = tensors["layers.0"]
    described = describe_pages(
        group(*tensors, "of another rank"), tensors, num_blocks=BLOCKS, chunk_tokens=TOKENS, page_format="x"
    )
    assert described.layer_names == ("layers.0", "layers.1")


def test_smaller_blocks_of_the_backend_make_a_page() -> None:
    tensor = torch.randn(2 * BLOCKS, HEADS, TOKENS // 2, WIDTH)
    pages = page_bytes("layers.0", tensor, BLOCKS)
    assert pages.shape == (BLOCKS, HEADS * TOKENS * WIDTH * 4)
    assert torch.equal(pages[1].view(torch.float32), tensor[2:4].flatten())


def test_a_page_in_pieces_is_refused_with_what_to_do() -> None:
    scattered = torch.randn(HEADS, BLOCKS, TOKENS, WIDTH).transpose(0, 1)  # heads outside of blocks
    with pytest.raises(ConfigError, match=r"layers.0: got a page in pieces.*VLLM_KV_CACHE_LAYOUT"):
        page_bytes("layers.0", scattered, BLOCKS)
