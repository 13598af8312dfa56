"""Two engines in two processes: what one has computed, the other one does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.vllm.harness import BLOCK, START_S, EngineProcess, Machine, eventually, forget, prompt


class Pair(NamedTuple):
    """Two engines, one of which loads asynchronously, over one pool."""

    machine: Machine
    one: EngineProcess
    other: EngineProcess


@pytest.fixture(scope="module")
def pair(machine: Machine, model: Callable[..., Path]) -> Pair:
    """The engines share a holder's segment."""
    machine.start_server()
    machine.start_holder("64MiB")
    llama = model("llama")
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"ipc://{machine.folder}/events",
    }
    one = machine.engine(llama, name="one", wait=False, kv_events_config=events)
    other = machine.engine(llama, name="other", wait=False, extra={"load": "async"}, async_scheduling=False)
    one.receive(START_S)
    other.receive(START_S)
    return Pair(machine, one, other)


def stored(pair: Pair, engine: EngineProcess) -> None:
    """Wait until the engine has nothing on its way to the pool."""
    forget(engine)


def own_hit(engine: EngineProcess, asked: list[int], **how: Any) -> dict[str, Any]:
    """What the engine answers when it has the prompt's KV itself."""
    engine.ask(asked, **how)
    answer = engine.ask(asked, **how)
    assert answer["cached"] == (len(asked) - 1) // BLOCK * BLOCK
    return answer


def same(answer: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether tokens and logprobs are equal, bit for bit."""
    return answer["tokens"] == expected["tokens"] and answer["logprobs"] == expected["logprobs"]


@pytest.mark.parametrize("turn", ["one to other", "other to one"])
def test_the_other_engine_loads_and_answers_the_same_bit_for_bit(pair: Pair, turn: str) -> None:
    first, second = (pair.one, pair.other) if turn == "one to other" else (pair.other, pair.one)
    asked = prompt(1 if first is pair.one else 2, 400)
    expected = own_hit(first, asked, max_tokens=8)
    stored(pair, first)
    answer = second.ask(asked, max_tokens=8)
    assert answer["cached"] == expected["cached"] == 384
    assert same(answer, expected)


@pytest.mark.parametrize("side", ["one", "other"])
def test_a_prefix_hits_up_to_every_chunk_boundary(pair: Pair, side: str) -> None:
    owner, reader = (pair.one, pair.other) if side == "other" else (pair.other, pair.one)
    base = prompt(10 if side == "one" else 11, 6 * BLOCK)
    owner.ask([*base, 5])
    stored(pair, owner)
    for shared in range(6 * BLOCK + 1):
        if shared % BLOCK not in (0, 1, BLOCK - 1):
            continue
        asked = base[:shared] + prompt(1000 + shared, 40)
        expected = own_hit(owner, asked)
        stored(pair, owner)  # the question's own blocks, too
        forget(reader)
        answer = reader.ask(asked)
        assert answer["cached"] == expected["cached"]
        assert same(answer, expected), shared


def test_exactly_what_is_shared_is_loaded(pair: Pair) -> None:
    base = prompt(20, 8 * BLOCK)
    pair.one.ask([*base, 5])
    stored(pair, pair.one)
    for chunks in range(9):
        asked = base[: chunks * BLOCK] + prompt(2000 + chunks, BLOCK)
        forget(pair.other)
        assert pair.other.ask(asked)["cached"] == chunks * BLOCK


def test_a_chat_goes_on_in_the_other_engine(pair: Pair) -> None:
    history = prompt(30, 100)
    engines = [pair.one, pair.other]
    computed = 0
    for turn in range(5):
        engine = engines[turn % 2]
        answer = engine.ask(history, max_tokens=40)
        assert answer["cached"] == computed // BLOCK * BLOCK
        stored(pair, engine)
        computed = len(history) + 39  # the last token that was answered has no KV
        history = history + answer["tokens"] + prompt(300 + turn, 50)


def test_a_batch_of_hits_and_misses(pair: Pair) -> None:
    known = [prompt(40 + at, 200 + 50 * at) for at in range(3)]
    expected = [own_hit(pair.one, each) for each in known]
    stored(pair, pair.one)
    news = [prompt(50 + at, 180 + 40 * at) for at in range(3)]
    asked = [each for two in zip(known, news, strict=True) for each in two]
    answers = pair.other.generate(*asked)
    assert [answer["cached"] for answer in answers[::2]] == [each["cached"] for each in expected]
    assert [answer["cached"] for answer in answers[1::2]] == [0, 0, 0]
    for answer, each in zip(answers[::2], expected, strict=True):
        # In a batch sums are rounded otherwise, so not bit for bit.
        assert dict(answer["logprobs"][0])[each["tokens"][0]] == pytest.approx(
            dict(each["logprobs"][0])[each["tokens"][0]], abs=0.1
        )


def test_a_salt_keeps_tenants_apart(pair: Pair) -> None:
    asked = prompt(60, 200)
    pair.one.ask(asked, salt="ours")
    stored(pair, pair.one)
    assert pair.other.ask(asked, salt="theirs")["cached"] == 0
    assert pair.other.ask(asked)["cached"] == 0
    forget(pair.other)
    assert pair.other.ask(asked, salt="ours")["cached"] == 192


def test_requests_that_want_logprobs_of_the_prompt_are_computed(pair: Pair) -> None:
    asked = prompt(61, 200)
    pair.one.ask(asked)
    stored(pair, pair.one)
    assert pair.other.ask(asked, prompt_logprobs=1)["cached"] == 0


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_aborted_requests_hold_nothing(pair: Pair, steps: int) -> None:
    asked = [prompt(70 + steps, 900), prompt(80 + steps, 500)]
    pair.one.generate(*asked)
    stored(pair, pair.one)
    for engine in (pair.other, pair.one):
        engine.call("abort", prompts=asked, after_steps=steps)
        forget(engine)
    pair.machine.nothing_is_held()
    assert pair.other.ask(asked[0])["cached"] == 896


def test_blocks_that_the_pool_has_are_not_stored_again(pair: Pair) -> None:
    asked = prompt(90, 300)
    pair.one.ask(asked)
    stored(pair, pair.one)
    before = pair.machine.counters()["chunks"]
    pair.other.ask(asked)
    pair.one.ask(asked)
    stored(pair, pair.other)
    assert pair.machine.counters()["chunks"] == before


def test_events_tell_what_was_stored(pair: Pair) -> None:
    import msgspec
    import zmq

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.connect(f"ipc://{pair.machine.folder}/events")
    subscriber.subscribe(b"")
    told: list[dict[str, Any]] = []

    def hear() -> bool:
        asked = prompt(9000 + len(told), 3 * BLOCK + 1)  # until the subscription has reached the publisher
        pair.one.ask(asked)
        stored(pair, pair.one)
        while subscriber.poll(50):
            events = msgspec.msgpack.decode(subscriber.recv_multipart()[-1])[1]
            told.extend(
                event for event in events if event["type"] == "BlockStored" and event["medium"] == "CPU"
            )
        return bool(told)

    eventually(hear, "an event arrives")
    assert {len(event["block_hashes"]) for event in told} == {1}
    assert {event["block_size"] for event in told} == {BLOCK}
    assert all(len(event["token_ids"]) == BLOCK for event in told)
    context.destroy(linger=0)


def test_metrics_say_what_happened(pair: Pair) -> None:
    before = pair.other.call("metrics")
    asked = prompt(100, 400)
    pair.one.ask(asked)
    stored(pair, pair.one)
    pair.other.ask(asked)
    after = pair.other.call("metrics")
    page_bytes = 2 * 2 * BLOCK * 2 * 32 * 2  # layers, K and V, tokens, heads, head size, bfloat16
    assert after["vllm:vcache_hit_tokens_total"] - before["vllm:vcache_hit_tokens_total"] == 384
    assert (
        after["vllm:vcache_loaded_bytes_total"] - before["vllm:vcache_loaded_bytes_total"] == 12 * page_bytes
    )
    assert after["vllm:vcache_load_seconds_count"] - before["vllm:vcache_load_seconds_count"] == 1
    assert pair.one.call("metrics")["vllm:vcache_stored_bytes_total"] > 0


def test_reset_with_the_connector_empties_the_pool(pair: Pair) -> None:
    asked = prompt(110, 300)
    pair.one.ask(asked)
    stored(pair, pair.one)
    assert pair.machine.chunks() > 0
    assert pair.one.call("reset", connector=True)
    assert pair.machine.chunks() == 0
    assert pair.other.ask(asked)["cached"] == 0


def test_nothing_is_left_behind(pair: Pair) -> None:
    for engine in (pair.one, pair.other):
        forget(engine)
        assert "Traceback" not in "\n".join(
            line
            for line in engine.log.read_text().splitlines()
            if "Tokenizer" not in line and "base.py" not in line
        )
        assert engine.call("metrics")["vllm:vcache_failures_total"] == 0
    pair.machine.nothing_is_held()
