"""Stores and retrieves in the background: their handles, how many there may be, and the engine's end."""

from __future__ import annotations

import threading

import pytest

from tests.processes.content import PagedPrompt
from tests.processes.worker import DEADLINE_S
from tests.support.engines import CHUNK
from vcache.engine import VCacheEngine
from vcache.engine.handles import Gate, Operations
from vcache.errors import EngineClosed
from vcache.limits import ASYNC_OPERATIONS_MAX


def test_handles_are_done_when_the_copy_is(engine: VCacheEngine) -> None:
    paged = PagedPrompt(30, 4 * CHUNK).fill()
    stored = engine.store_async(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
    assert stored.result(DEADLINE_S) == 4
    assert stored.done()
    target = PagedPrompt(30, 4 * CHUNK)
    loaded = engine.retrieve_async(target.tokens, kvcaches=target.kvcaches, slot_mapping=target.slots)
    mask = loaded.result(DEADLINE_S)
    assert mask.all()
    assert target.wrong_tokens(mask) == 0


def test_what_exceeds_the_limit_is_refused_and_a_finished_one_makes_room() -> None:
    operations, go = Operations(), threading.Event()
    handles = [operations.submit(lambda: go.wait(DEADLINE_S)) for _ in range(ASYNC_OPERATIONS_MAX)]
    assert operations.submit(lambda: True) is None
    first = handles[0]
    assert first is not None
    assert not first.done()
    with pytest.raises(TimeoutError, match="not done after"):
        first.result(0.001)
    go.set()
    assert [handle.result(DEADLINE_S) for handle in handles if handle] == [True] * ASYNC_OPERATIONS_MAX
    again = operations.submit(lambda: 5)
    operations.close()
    assert again is not None
    assert again.result() == 5


def test_a_handle_raises_what_the_operation_raised() -> None:
    operations = Operations()

    def fail() -> int:
        raise RuntimeError("device fault")

    handle = operations.submit(fail)
    operations.close()
    assert handle is not None
    with pytest.raises(RuntimeError, match="device fault"):
        handle.result()


def test_close_waits_for_those_inside() -> None:
    gate, inside, leave, closed = Gate("g"), threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        with gate.call():
            inside.set()
            assert leave.wait(DEADLINE_S)
            assert not closed.is_set()

    def close() -> None:
        gate.close()
        closed.set()

    threads = [threading.Thread(target=work), threading.Thread(target=close)]
    threads[0].start()
    assert inside.wait(DEADLINE_S)
    threads[1].start()
    leave.set()
    assert closed.wait(DEADLINE_S)
    for thread in threads:
        thread.join(DEADLINE_S)
    with pytest.raises(EngineClosed), gate.call():
        pass
