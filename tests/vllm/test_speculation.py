"""Engines that guess tokens ahead: nothing of wrong guesses is stored, and a draft model's KV comes with the
other layers'.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.harness import BLOCK, START_S, EngineProcess, Machine, eventually, prompt


def speculation(method: str, model: Callable[..., Path]) -> dict[str, Any]:
    """A speculative_config of three tokens ahead."""
    beside: dict[str, dict[str, Any]] = {
        "ngram": {"prompt_lookup_max": 2, "prompt_lookup_min": 1},
        "draft_model": {"model": str(model("llama"))},
        "eagle": {"model": str(model("eagle"))},
    }
    return {"method": method, "num_speculative_tokens": 3, **beside[method]}


def forget(engine: EngineProcess) -> None:
    """Empty the engine's own prefix cache, which waits for what is on its way to the pool."""
    eventually(lambda: engine.call("reset"), "no block is in use")


def accepted(engine: EngineProcess) -> float:
    """Guesses that turned out right, since the start."""
    return float(engine.call("metrics").get("vllm:spec_decode_num_accepted_tokens_total", 0.0))


@pytest.mark.parametrize(
    "method",
    [
        "draft_model",
        pytest.param("ngram", marks=pytest.mark.long),
        pytest.param("eagle", marks=pytest.mark.long),
    ],
)
def test_engines_that_guess_share_what_they_verified(
    machine: Machine, model: Callable[..., Path], method: str
) -> None:
    if machine.server is None:
        machine.start_server()
        machine.start_holder("64MiB")
    options = {"model": model("llama"), "speculative_config": speculation(method, model)}
    one, other = (machine.engine(name=f"{method}-{each}", wait=False, **options) for each in "ab")
    one.receive(START_S)
    other.receive(START_S)
    for seed in range(4):
        asked = prompt(40 + seed, 150 + 37 * seed)
        answer = one.ask(asked, max_tokens=90)["tokens"]  # of which most chunks are of generated tokens
        turn = [*asked, *answer, *prompt(50 + seed, 20)]
        forget(one)
        generated = one.ask(turn, max_tokens=30)["cached"]
        assert generated == (len(asked) + len(answer) - 1) // BLOCK * BLOCK
        before = accepted(one)
        own = one.ask(turn, max_tokens=30)
        guessed = accepted(one) - before
        forget(one)
        before = accepted(other)
        found = other.ask(turn, max_tokens=30)
        assert found["cached"] == (len(turn) - 1) // BLOCK * BLOCK
        assert found["tokens"] == own["tokens"]
        if own["cached"] == found["cached"]:  # with EAGLE vLLM computes a block of its own hits again
            assert found["logprobs"] == own["logprobs"]
            assert accepted(other) - before == guessed
        forget(other)
    if method == "draft_model":  # the same model guesses, so most guesses are right
        assert accepted(other) > 30
    machine.nothing_is_held()
    for engine in (one, other):
        engine.kill()
        machine.engines.remove(engine)
