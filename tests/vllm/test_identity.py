"""Whose KV it is, by vLLM's own configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import LoadConfig, ModelConfig

from integration.vllm.identity import _canonical, model_identity

FP8, INT8 = {"linear": "fp8_per_tensor"}, {"moe": "int8_per_channel_weight_only"}


@pytest.fixture
def identity(model: Callable[..., Path]) -> Callable[..., str]:
    """The digest that an engine's configuration gives."""

    def of(loader: dict[str, Any] | None = None, draft: Any = None, **options: Any) -> str:
        config = SimpleNamespace(
            model_config=configured(**options),
            speculative_config=draft and SimpleNamespace(method="eagle", draft_model_config=draft),
            load_config=LoadConfig(model_loader_extra_config=loader or {}),
            cache_config=SimpleNamespace(cache_dtype="auto"),
            parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        )
        return model_identity(config)[1]

    def configured(**options: Any) -> ModelConfig:
        return ModelConfig(model=str(model("llama")), skip_tokenizer_init=True, **options)

    of.configured = configured  # type: ignore[attr-defined]
    return of


def test_how_weights_are_quantised_while_they_are_read_counts(identity: Callable[..., str]) -> None:
    plain = identity()
    fp8 = identity(quantization="online", quantization_config=FP8)
    int8 = identity(quantization="online", quantization_config=INT8)
    some = identity(quantization="online", quantization_config=FP8 | {"ignore": ["re:.*gate.*"]})
    assert len({plain, fp8, int8, some}) == 4
    assert fp8 == identity(quantization="online", quantization_config=dict(FP8))


def test_a_draft_model_s_quantisation_counts(identity: Any) -> None:
    drafts = [identity.configured(quantization="online", quantization_config=each) for each in (FP8, INT8)]
    assert len({identity(), *(identity(draft=draft) for draft in drafts)}) == 3


def test_what_the_loader_is_told_counts(identity: Callable[..., str]) -> None:
    assert (
        identity() == identity({}) != identity({"tensorizer_uri": "a"}) != identity({"tensorizer_uri": "b"})
    )


def test_the_order_in_which_something_is_said_does_not_count() -> None:
    assert _canonical({"a": {"x", "y", "z"}, "b": 1}) == _canonical({"b": 1, "a": {"z", "y", "x"}})
