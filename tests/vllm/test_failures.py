"""What vLLM does when the server, a holder or another engine is not there, or dies in mid-load."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.harness import START_S, EngineProcess, Machine, eventually, forget, prompt

FAULTY: dict[str, Any] = {"kv_connector": "FaultyConnector", "kv_connector_module_path": "tests.vllm.faulty"}
TOKENS = 400
HIT = 384


class Faults:
    """A machine with engines whose loads can be stopped."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self.folder = folder

    @contextmanager
    def in_mid_load(self, engine: EngineProcess, asked: list[int]) -> Iterator[None]:
        """The engine has copied what it was granted for this prompt, and has not asked the fence."""
        (self.folder / "stop").touch()
        engine.send("generate", prompts=[asked], max_tokens=4)
        eventually((self.folder / "reached").exists, "a load begins")
        try:
            yield
        finally:
            (self.folder / "reached").unlink()
            (self.folder / "go").touch()
            eventually(lambda: not (self.folder / "go").exists(), "the load goes on")


@pytest.fixture(scope="module")
def faults(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Faults:
    """Where loads are told to stop."""
    return Faults(machine, tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def engines(faults: Faults, model: Callable[..., Path]) -> dict[str, EngineProcess]:
    """By load and policy; they start while there is no server."""
    machine, llama = faults.machine, model("llama")
    kinds = {("sync", "recompute"), ("async", "recompute"), ("sync", "fail"), ("async", "fail")}
    engines = {
        f"{load} {policy}": machine.engine(
            llama,
            name=f"{load}-{policy}",
            wait=False,
            extra={"load": load},
            transfer={**FAULTY, "kv_load_failure_policy": policy},
            environ={"FAULTS_FOLDER": str(faults.folder)},
        )
        for load, policy in sorted(kinds)
    }
    for engine in engines.values():
        engine.receive(START_S)
    return engines


@pytest.fixture
def served(faults: Faults, engines: dict[str, EngineProcess]) -> None:
    """There is a server and a segment, whatever ran before."""
    machine = faults.machine
    if machine.server is None:
        machine.start_server()
    if not machine.observer.stats().segments:
        machine.start_holder()


KINDS = ["async recompute", "sync recompute", "async fail", "sync fail"]


def in_the_pool(engine: EngineProcess, asked: list[int]) -> dict[str, Any]:
    """Have the prompt's KV in the pool and nowhere else; what the engine answers with it. An engine whose
    client has not found the server again, after a test that killed it, is asked until it stores.
    """
    engine.ask(asked, max_tokens=4)
    expected = engine.ask(asked, max_tokens=4)
    assert expected["cached"] == HIT

    def stored() -> bool:
        forget(engine)
        return bool(engine.ask(asked, max_tokens=4)["cached"] == HIT)

    eventually(stored, "the engine's chunks are in the pool")
    forget(engine)
    return expected


def same(answer: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether tokens and logprobs are equal, bit for bit."""
    return answer["tokens"] == expected["tokens"] and answer["logprobs"] == expected["logprobs"]


def test_vllm_starts_and_serves_without_a_server_and_uses_it_when_it_comes(
    faults: Faults, engines: dict[str, EngineProcess]
) -> None:
    asked = prompt(1, TOKENS)
    cold = {kind: engine.ask(asked, max_tokens=4) for kind, engine in engines.items()}
    assert len({tuple(answer["tokens"]) for answer in cold.values()}) == 1
    for engine in engines.values():
        assert engine.ask(asked, max_tokens=4)["cached"] == HIT  # its own
        forget(engine)
    faults.machine.start_server()
    faults.machine.start_holder()
    engine = engines["sync recompute"]

    def comes_back() -> bool:
        forget(engine)
        return bool(engine.ask(asked, max_tokens=4)["cached"] == HIT)

    eventually(comes_back, "the engine uses the server")
    assert "kv_load_failure_policy is 'fail'" in engines["sync fail"].log.read_text()
    assert "kv_load_failure_policy is 'fail'" not in engines["sync recompute"].log.read_text()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("served")
def test_the_holder_dies_in_mid_load(faults: Faults, engines: dict[str, EngineProcess], kind: str) -> None:
    machine, engine = faults.machine, engines[kind]
    asked = prompt(10 + KINDS.index(kind), TOKENS)
    expected = in_the_pool(engine, asked)
    before = engine.call("metrics")
    with faults.in_mid_load(engine, asked):
        machine.holders[-1].send_signal(signal.SIGKILL)
        machine.holders[-1].wait(30)
        eventually(lambda: not machine.observer.stats().segments, "the server has seen it")
    (answer,) = engine.receive()
    if "fail" in kind:
        assert answer["finish"] == "error"
    else:
        assert answer["finish"] == "length"
        cold = engine.ask(asked, max_tokens=4)
        assert answer["tokens"] == expected["tokens"] == cold["tokens"]
    after = engine.call("metrics")
    assert after["vllm:vcache_failures_total"] > before["vllm:vcache_failures_total"]
    assert after["vllm:vcache_failed_loads_total"] == before["vllm:vcache_failed_loads_total"] + 1
    machine.start_holder()
    assert in_the_pool(engine, prompt(20 + KINDS.index(kind), TOKENS))
    machine.nothing_is_held()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("served")
def test_the_server_dies_in_mid_load_and_the_load_counts(
    faults: Faults, engines: dict[str, EngineProcess], kind: str
) -> None:
    machine, engine = faults.machine, engines[kind]
    asked = prompt(30 + KINDS.index(kind), TOKENS)
    expected = in_the_pool(engine, asked)
    with faults.in_mid_load(engine, asked):
        machine.kill_server()
    (answer,) = engine.receive()
    assert answer["cached"] == HIT
    assert same(answer, expected)
    assert engine.ask(prompt(40, TOKENS))["finish"] == "length"  # without a server
    machine.start_server()
    eventually(lambda: machine.observer.connected and machine.observer.stats().segments, "the pool is back")

    def hits_again() -> bool:
        forget(engine)
        return bool(engine.ask(asked, max_tokens=4)["cached"] == HIT)

    eventually(hits_again, "the pool is as warm as before")
    machine.nothing_is_held()


@pytest.mark.usefixtures("served")
def test_a_chunk_that_failed_is_not_loaded_again(faults: Faults, engines: dict[str, EngineProcess]) -> None:
    machine, engine = faults.machine, engines["async recompute"]
    asked = prompt(50, TOKENS)
    in_the_pool(engine, asked)
    loads = engine.call("metrics")["vllm:vcache_load_seconds_count"]
    with faults.in_mid_load(engine, asked):
        machine.holders[-1].send_signal(signal.SIGKILL)
        machine.holders[-1].wait(30)
        eventually(lambda: not machine.observer.stats().segments, "the server has seen it")
        machine.start_holder()
        other = engines["sync recompute"]
        forget(other)
        other.ask(asked, max_tokens=4)  # another copy of the same chunks
        forget(other)
    (answer,) = engine.receive()
    assert answer["finish"] == "length"
    assert engine.call("metrics")["vllm:vcache_load_seconds_count"] == loads + 1


@pytest.mark.usefixtures("served")
def test_another_engine_dies_in_mid_load(
    faults: Faults, engines: dict[str, EngineProcess], model: Callable[..., Path]
) -> None:
    machine, engine = faults.machine, engines["async recompute"]
    for holder in machine.holders:
        if holder.poll() is None:
            holder.kill()
            holder.wait(30)
    eventually(lambda: not machine.observer.stats().segments, "no segment is left")
    lender = machine.engine(model("llama"), name="lender", extra={"segment.size": "32MiB"})
    eventually(lambda: len(machine.observer.stats().segments) == 1, "it lends a segment")
    asked = prompt(60, TOKENS)
    lender.ask(asked, max_tokens=4)
    expected = lender.ask(asked, max_tokens=4)
    forget(lender)
    forget(engine)
    with faults.in_mid_load(engine, asked):
        lender.kill()
        eventually(lambda: not machine.observer.stats().segments, "the server has seen it")
    (answer,) = engine.receive()
    assert answer["finish"] == "length"
    assert answer["tokens"] == expected["tokens"]


def forget_in_process(engine: EngineProcess) -> None:
    """As `forget`, of an engine that makes no step by itself."""

    def forgotten() -> bool:
        engine.call("abort", prompts=[], after_steps=1)
        return bool(engine.call("reset"))

    eventually(forgotten, "no block is in use")


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.usefixtures("served")
def test_rubbish_that_two_requests_of_a_step_share_is_nowhere_found(
    faults: Faults, model: Callable[..., Path], policy: str
) -> None:
    machine = faults.machine
    engine = machine.engine(
        model("llama"),
        name=f"one-process-{policy}",
        extra={"load": "sync", "lookup_deadline_ms": 1000},
        transfer={**FAULTY, "kv_load_failure_policy": policy},
        environ={"FAULTS_FOLDER": str(faults.folder), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    seed = 70 if policy == "fail" else 71
    asked = prompt(seed, TOKENS)
    other = asked[:HIT] + prompt(seed + 10, 80)
    expected = [engine.ask(each, max_tokens=4)["tokens"] for each in (asked, other)]
    forget_in_process(engine)
    for name in ("stop", "spoil"):
        (faults.folder / name).touch()
    engine.send("generate", prompts=[asked, other], max_tokens=4)
    eventually((faults.folder / "reached").exists, "a load begins")
    (faults.folder / "reached").unlink()
    machine.observer.clear()  # what the pool has after this was stored after the load
    (faults.folder / "go").touch()
    answers = engine.receive()
    assert not (faults.folder / "spoil").exists()
    if policy == "fail":
        assert [answer["finish"] for answer in answers] == ["error", "error"]
        assert machine.chunks() == 0
        assert engine.ask(asked, max_tokens=4)["cached"] == 0  # nor in vLLM's own cache
    else:
        assert [answer["tokens"] for answer in answers] == expected
    again = [engine.ask(each, max_tokens=4) for each in (asked, other)]
    assert [answer["tokens"] for answer in again] == expected
    forget_in_process(engine)
    again = [engine.ask(each, max_tokens=4) for each in (asked, other)]
    assert [answer["tokens"] for answer in again] == expected
    engine.kill()


def test_the_engines_say_nothing_worse_than_warnings(engines: dict[str, EngineProcess]) -> None:
    for engine in engines.values():
        ours = [
            line for line in engine.log.read_text().splitlines() if "vcache" in line or "integration" in line
        ]
        assert not [line for line in ours if "ERROR" in line or "Traceback" in line]
