"""Engines that guess tokens ahead: nothing of wrong guesses is stored, and a draft model's KV comes with the
other layers'.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.harness import BLOCK, START_S, EngineProcess, Machine, forget, prompt


def speculation(method: str, model: Callable[..., Path]) -> dict[str, Any]:
    """A speculative_config of three tokens ahead. The draft model is a little unlike the model, so that some
    of its guesses are wrong.
    """
    beside: dict[str, dict[str, Any]] = {
        "ngram": {"prompt_lookup_max": 2, "prompt_lookup_min": 1},
        "draft_model": {"model": str(model("drafter"))},
        "eagle": {"model": str(model("eagle"))},
    }
    return {"method": method, "num_speculative_tokens": 3, **beside[method]}


def guesses(engine: EngineProcess, kind: str) -> float:
    """How many tokens were guessed since the start: "draft", or turned out right: "accepted"."""
    return float(engine.call("metrics")[f"vllm:spec_decode_num_{kind}_tokens_total"])


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
    for seed, tokens in enumerate((150, 230, 166, 261)):  # with the answers: 240, 320, 256, 351
        asked = prompt(40 + seed, tokens)
        turn = [*asked, *one.ask(asked, max_tokens=90)["tokens"], *prompt(50 + seed, 20)]
        whole = (len(turn) - 1) // BLOCK * BLOCK
        one.ask(turn)
        before = guesses(one, "accepted")
        own = one.ask(turn, max_tokens=30)  # what vLLM has itself, of guesses in part, never in the pool yet
        right = guesses(one, "accepted") - before
        forget(one)
        for engine in (one, other):
            before = guesses(engine, "accepted")
            found = engine.ask(turn, max_tokens=30)
            assert found["cached"] == whole
            assert found["tokens"] == own["tokens"]
            if method != "eagle":  # where vLLM computes the last block of its own hits again
                assert own["cached"] == whole
                assert found["logprobs"] == own["logprobs"]
                assert guesses(engine, "accepted") - before == right
            forget(engine)
    for engine in (one, other):
        right, all_of_them = guesses(engine, "accepted"), guesses(engine, "draft")
        assert right < all_of_them and (right > 0 or method == "eagle")  # whose head was never trained
    machine.nothing_is_held()
    for engine in (one, other):
        engine.kill()
        machine.engines.remove(engine)
