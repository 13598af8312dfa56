"""Models of other kinds, other connectors beside ours, and engines that must never find each other's KV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.harness import (
    BLOCK,
    START_S,
    EngineFailed,
    EngineProcess,
    Machine,
    eventually,
    forget,
    prompt,
)
from tests.vllm.models import IMAGE_TOKENS

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def pool(machine: Machine) -> Machine:
    """A server and a holder."""
    machine.start_server()
    machine.start_holder("64MiB")
    return machine


@pytest.fixture(scope="module")
def writer(pool: Machine, model: Callable[..., Path]) -> EngineProcess:
    """An engine with the usual model."""
    return pool.engine(model("llama"), name="writer")


def start(pool: Machine, *engines: dict[str, Any]) -> list[EngineProcess]:
    """Start engines at once."""
    started = [pool.engine(wait=False, **options) for options in engines]
    for engine in started:
        engine.receive(START_S)
    return started


def end(pool: Machine, *engines: EngineProcess) -> None:
    """End engines, for the memory."""
    for engine in engines:
        engine.kill()
        pool.engines.remove(engine)


def test_another_model_dtype_or_block_size_never_hits(
    pool: Machine, writer: EngineProcess, model: Callable[..., Path]
) -> None:
    asked = prompt(1, 500)
    writer.ask(asked)
    forget(writer)
    others = start(
        pool,
        {"model": model("llama", seed=1), "name": "weights"},
        {"model": model("llama"), "name": "dtype", "dtype": "float32"},
        {"model": model("llama"), "name": "block", "block_size": 2 * BLOCK},
    )
    for other in others:
        assert other.ask(asked)["cached"] == 0, other.log.name
        forget(other)
        assert other.ask(asked)["cached"] > 0, other.log.name  # what it stored itself
    assert writer.ask(asked)["cached"] == 480
    end(pool, *others)


def test_two_tensor_parallel_ranks_have_chunks_of_their_own(
    pool: Machine, writer: EngineProcess, model: Callable[..., Path]
) -> None:
    asked = prompt(2, 500)
    writer.ask(asked)
    forget(writer)
    before = pool.counters()["chunks"]
    (split,) = start(
        pool, {"model": model("llama"), "name": "split", "cores": "0|1", "tensor_parallel_size": 2}
    )
    assert split.ask(asked)["cached"] == 0
    expected = split.ask(asked, max_tokens=4)
    forget(split)
    assert pool.counters()["chunks"] == before + 2 * (500 // BLOCK)
    answer = split.ask(asked, max_tokens=4)
    assert answer["cached"] == expected["cached"] == 480
    assert answer["logprobs"] == expected["logprobs"]
    end(pool, split)


def test_of_equal_latents_one_rank_stores_and_all_load(pool: Machine, model: Callable[..., Path]) -> None:
    asked = prompt(12, 500)
    before = pool.counters()["chunks"]
    options = {"tensor_parallel_size": 2, "cores": "0|1", "block_size": 16}
    (latent,) = start(pool, {"model": model("deepseek"), "name": "latent", **options})
    computed = latent.ask(asked, max_tokens=4)
    forget(latent)  # on CPUs vLLM has no prefix cache of its own with MLA; but it waits for what is stored
    assert pool.counters()["chunks"] == before + 500 // 16
    loaded, again = latent.ask(asked, max_tokens=4), latent.ask(asked, max_tokens=4)
    assert computed["cached"] == 0 and loaded["cached"] == again["cached"] == 496
    assert loaded["logprobs"] == again["logprobs"]
    assert loaded["tokens"] == again["tokens"] == computed["tokens"]
    end(pool, latent)


def test_an_image_counts_by_its_content(pool: Machine, model: Callable[..., Path]) -> None:
    options = {"model": model("blip2"), "skip_tokenizer_init": False}
    one, other = start(pool, {"name": "sees-a", **options}, {"name": "sees-b", **options})
    asked, red, green = prompt(14, 300), [200, 10, 10], [10, 200, 10]
    one.ask(asked, image=red)
    expected = one.ask(asked, image=red, max_tokens=4)
    forget(one)
    unlike = other.ask(asked, image=green, max_tokens=4)
    assert unlike["cached"] == 0 and unlike["logprobs"] != expected["logprobs"]
    answer = other.ask(asked, image=red, max_tokens=4)
    assert answer["cached"] == expected["cached"] == (300 + IMAGE_TOKENS - 1) // BLOCK * BLOCK
    assert answer["logprobs"] == expected["logprobs"]
    end(pool, one, other)


def test_a_hybrid_model_shares_all_its_groups(pool: Machine, model: Callable[..., Path]) -> None:
    options = {"model": model("gemma3"), "num_gpu_blocks_override": 768, "max_num_batched_tokens": 256}
    one, other = start(pool, {"name": "hybrid-a", **options}, {"name": "hybrid-b", **options})
    for tokens in (70, 200, 700):
        asked = prompt(300 + tokens, tokens)
        one.ask(asked, max_tokens=4)
        expected = one.ask(asked, max_tokens=4)
        forget(one)
        answer = other.ask(asked, max_tokens=4)
        assert answer["cached"] == expected["cached"] == (tokens - 1) // BLOCK * BLOCK
        assert answer["logprobs"] == expected["logprobs"]
        longer = asked[: tokens // 2] + prompt(1, 50)
        assert one.ask(longer)["cached"] == tokens // 2 // BLOCK * BLOCK  # also in the middle
        forget(one)
        forget(other)
        assert other.ask(longer)["cached"] == len(longer[:-1]) // BLOCK * BLOCK
    pool.nothing_is_held()
    end(pool, one, other)


def test_an_adapter_counts_by_its_content(pool: Machine, model: Callable[..., Path]) -> None:
    options = {"model": model("llama"), "enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    one, other = start(pool, {"name": "lora-a", **options}, {"name": "lora-b", **options})
    asked = prompt(7, 300)
    ours, theirs = str(model("adapter", seed=1)), str(model("adapter", seed=2))
    one.ask(asked, lora=["name", 1, ours], max_tokens=4)
    expected = one.ask(asked, lora=["name", 1, ours], max_tokens=4)
    forget(one)
    assert other.ask(asked)["cached"] == 0  # without an adapter
    assert other.ask(asked, lora=["name", 2, theirs])["cached"] == 0  # another one of that name
    answer = other.ask(asked, lora=["name", 3, ours], max_tokens=4)
    assert answer["cached"] == expected["cached"] == 288
    assert answer["logprobs"] == expected["logprobs"]
    end(pool, one, other)


def test_private_keys_are_shared_with_nobody_and_new_after_a_reset(
    pool: Machine, writer: EngineProcess, model: Callable[..., Path]
) -> None:
    (private,) = start(pool, {"model": model("llama"), "name": "private", "extra": {"private": "yes"}})
    asked = prompt(9, 300)
    writer.ask(asked)
    forget(writer)
    assert private.ask(asked)["cached"] == 0
    forget(private)
    assert private.ask(asked)["cached"] == 288  # from the pool, what it stored itself
    eventually(lambda: private.call("reset", connector=True), "no block is in use")
    assert private.ask(asked)["cached"] == 0
    assert writer.ask(asked)["cached"] == 288  # others are not touched
    end(pool, private)


def test_layer_by_layer(pool: Machine, writer: EngineProcess, model: Callable[..., Path]) -> None:
    (layers,) = start(
        pool, {"model": model("llama"), "name": "layers", "extra": {"load": "sync", "layerwise": True}}
    )
    for seed in range(3):
        asked = prompt(800 + seed, 700)
        writer.ask(asked, max_tokens=4)
        expected = writer.ask(asked, max_tokens=4)
        forget(writer)
        answer = layers.ask(asked, max_tokens=4)
        assert answer["cached"] == expected["cached"] == 672
        assert answer["logprobs"] == expected["logprobs"]
    end(pool, layers)


def test_beside_another_connector(
    pool: Machine, writer: EngineProcess, model: Callable[..., Path], tmp_path: Path
) -> None:
    asked, filed = prompt(4, 500), prompt(5, 256 + 4)
    writer.ask(asked)
    forget(writer)
    both = [
        {
            "kv_connector": "VCacheConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"segment.size": 0},
        },
        {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
        },
    ]
    (multi,) = start(
        pool,
        {
            "model": model("llama"),
            "name": "multi",
            "transfer": {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": both}},
            "disable_hybrid_kv_cache_manager": True,
        },
    )
    multi.ask(prompt(6, 40))  # then our half knows its workers
    assert multi.ask(asked)["cached"] == 480
    multi.ask(filed)
    forget(multi)
    assert pool.observer.clear() > 0  # now only the files have it
    assert multi.ask(filed)["cached"] == 256
    assert list(tmp_path.iterdir())
    pool.nothing_is_held()
    end(pool, multi)


def test_a_wrong_setting_is_refused_at_the_start(pool: Machine, model: Callable[..., Path]) -> None:
    wrong = {
        "chunk_tokens: got 48, wanted a multiple of 32": {"chunk_tokens": 48},
        "lookup_deadline (from kv_connector_extra_config): unknown field": {"lookup_deadline": 5},
    }
    engines = {
        words: pool.engine(model("llama"), name="refused", extra=extra, wait=False)
        for words, extra in wrong.items()
    }
    for words, engine in engines.items():
        with pytest.raises(EngineFailed):
            engine.receive(START_S)
        assert words in engine.log.read_text()
    end(pool, *engines.values())
