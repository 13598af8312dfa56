"""Many requests through two engines, over a pool too small for them and a KV cache too small for all."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.harness import START_S, EngineProcess, Machine, eventually, prompt

REQUESTS = 500
BATCH = 10
GAP = 1e-3
"""Logprobs so close are a tie: sums in another order may decide it otherwise."""

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def engines(machine: Machine, model: Callable[..., Path]) -> dict[str, EngineProcess]:
    """Two that share (one with few blocks), and one that has no cache at all. In float32, for there are few
    ties.
    """
    machine.start_server()
    machine.start_holder("6MiB")
    llama = model("llama")
    options: dict[str, Any] = {"dtype": "float32", "wait": False}
    engines = {
        "sync": machine.engine(llama, name="sync", **options),
        "async": machine.engine(
            llama, name="async", extra={"load": "async"}, num_gpu_blocks_override=68, **options
        ),
        "reference": machine.engine(
            llama, name="reference", connector=False, enable_prefix_caching=False, **options
        ),
    }
    for engine in engines.values():
        engine.receive(START_S)
    return engines


def check(answer: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal tokens, up to a tie; equal logprobs, up to the order of sums."""
    for position, (got, wanted) in enumerate(zip(answer["logprobs"], expected["logprobs"], strict=True)):
        token, other = answer["tokens"][position], expected["tokens"][position]
        assert dict(got)[token] == pytest.approx(dict(wanted)[other], abs=GAP)
        if token != other:
            assert dict(wanted).get(token) == pytest.approx(dict(wanted)[other], abs=GAP)
            return  # from here on they answer different prompts
    assert answer["finish"] == expected["finish"] == "length"


def requests(seed: int, count: int) -> list[list[int]]:
    """Prompts that share beginnings with earlier ones, in all lengths."""
    draw = random.Random(seed)
    trunks = [prompt(1000 + at, 700) for at in range(12)]
    return [
        draw.choice(trunks)[: draw.randrange(0, 600)]
        + prompt(draw.randrange(1 << 30), draw.randrange(5, 120))
        for _ in range(count)
    ]


def test_every_answer_is_the_reference_s(machine: Machine, engines: dict[str, EngineProcess]) -> None:
    asked = requests(1, REQUESTS)
    draw = random.Random(2)
    for begin in range(0, REQUESTS, 2 * BATCH):
        halves = {"sync": asked[begin : begin + BATCH], "async": asked[begin + BATCH : begin + 2 * BATCH]}
        counts = {name: [draw.randrange(1, 12) for _ in half] for name, half in halves.items()}
        for name, half in halves.items():
            engines[name].send("generate", prompts=half, max_tokens=counts[name])
        answers = {name: engines[name].receive(300) for name in halves}
        together = [*halves["sync"], *halves["async"]]
        expected = engines["reference"].call(
            "generate", prompts=together, max_tokens=[*counts["sync"], *counts["async"]], within_s=300
        )
        for answer, each in zip([*answers["sync"], *answers["async"]], expected, strict=True):
            check(answer, each)
        if draw.random() < 0.3:
            for name in halves:
                eventually(lambda name=name: engines[name].call("reset"), "no block is in use")  # type: ignore[misc]
    for name in ("sync", "async"):
        metrics = engines[name].call("metrics")
        assert metrics["vllm:vcache_hit_tokens_total"] > 10_000
        assert metrics["vllm:vcache_stored_chunks_total"] > 100
    assert machine.counters()["evicted"] > 0
    machine.nothing_is_held()


def test_preempted_requests_go_on_right(machine: Machine, engines: dict[str, EngineProcess]) -> None:
    asked = [prompt(5000 + at, 300) for at in range(6)]
    expected = engines["reference"].generate(*asked, max_tokens=120)
    for _ in range(2):  # the second time with hits
        answers = engines["async"].generate(*asked, max_tokens=120)
        for answer, each in zip(answers, expected, strict=True):
            check(answer, each)
        eventually(lambda: engines["async"].call("reset"), "no block is in use")
    assert engines["async"].call("metrics")["vllm:num_preemptions_total"] > 0
    machine.nothing_is_held()
