"""Below the pool: what it lost, and what engines of before stored, is brought up before vLLM is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.harness import BLOCK, EngineProcess, Machine, eventually, prompt

TOKENS = 20 * BLOCK + 7
HIT = 20 * BLOCK


@pytest.fixture(scope="module")
def engine(machine: Machine, model: Callable[..., Path]) -> Iterator[Callable[[str, str], EngineProcess]]:
    """Start an engine with a local tier, in a pool of its own of some size; its name is its policy."""

    def start(policy: str, size: str) -> EngineProcess:
        machine.start_server()
        machine.start_holder(size)
        tiers = {
            "tiers.order": "rocksdb",
            "tiers.rocksdb.directory": str(machine.folder / "disk"),
            "fetch_deadline_ms": 30_000,  # vLLM computes on all cores
        }
        return machine.engine(model(), name=policy, extra={**tiers, "tiers.policy": policy})

    yield start
    machine.kill_server()


def keeps(engine: EngineProcess, chunks: int) -> None:
    """Wait until so many chunks have been written below."""
    eventually(lambda: _metric(engine, "written_chunks") >= chunks, "all is below")


def test_what_the_pool_forgot_and_what_an_engine_left_is_loaded_from_below(
    machine: Machine, engine: Callable[[str, str], EngineProcess]
) -> None:
    first = engine("write-through", "16MiB")
    asked = prompt(1, TOKENS)
    first.ask(asked, max_tokens=4)
    reference = first.ask(asked, max_tokens=4)  # a hit of vLLM's own
    assert reference["cached"] == HIT
    keeps(first, HIT // BLOCK)

    _forget(machine, first)
    assert machine.chunks() == 0
    again = first.ask(asked, max_tokens=4)
    assert _told(again) == _told(reference) and again["cached"] == HIT
    assert machine.chunks() >= HIT // BLOCK  # they are in the pool again
    eventually(lambda: _metric(first, "fetched_chunks") == HIT // BLOCK, "it was counted")

    half = prompt(1, 10 * BLOCK) + prompt(2, 5 * BLOCK)
    _forget(machine, first)
    mixed = first.ask(half, max_tokens=1)
    assert mixed["cached"] == 10 * BLOCK

    for process in (first, *machine.engines):
        process.kill()
    machine.engines.clear()
    machine.kill_server()
    for holder in machine.holders:
        holder.kill()
        holder.wait(30)
    second = engine("write-back", "1MiB")
    assert machine.chunks() == 0
    answer = second.ask(asked, max_tokens=4)
    assert _told(answer) == _told(reference) and answer["cached"] == HIT
    machine.nothing_is_held()


def test_what_is_evicted_is_written_then_and_a_reset_empties_all(machine: Machine) -> None:
    second = machine.engines[-1]
    before = _metric(second, "written_chunks")
    asked = [prompt(10 + number, TOKENS) for number in range(5)]  # more than the pool holds
    for each in asked:
        second.ask(each)

    def is_kept() -> bool:
        """On a busy machine chunks may go unsaved: then others have to."""
        if _metric(second, "written_chunks") >= before + 2 * HIT // BLOCK:
            return True
        asked.append(prompt(10 + len(asked), TOKENS))
        second.ask(asked[-1])
        return False

    eventually(is_kept, "what had to go is below")
    eventually(lambda: second.call("reset"), "vLLM's own prefix cache is empty")
    assert any(second.ask(each)["cached"] == HIT for each in asked)

    eventually(lambda: second.call("reset", connector=True), "the pool is reset")
    assert all(second.ask(each)["cached"] == 0 for each in asked)


def _forget(machine: Machine, engine: EngineProcess) -> None:
    """Have neither vLLM nor the pool know anything any more."""
    eventually(lambda: engine.call("reset"), "vLLM's own prefix cache is empty")
    listed = machine.observer.list(0, 1000).rows
    machine.observer.remove([row.key for row in listed])


def _told(answer: dict[str, Any]) -> tuple[Any, Any]:
    return answer["tokens"], answer["logprobs"]


def _metric(engine: EngineProcess, name: str) -> float:
    """As of now: vLLM hears of it with a step."""
    engine.ask(prompt(99, 5))
    metrics: dict[str, float] = engine.call("metrics")
    return metrics.get(f"vllm:vcache_{name}_total", 0)
