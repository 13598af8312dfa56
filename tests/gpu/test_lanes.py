"""Streams and events on a GPU: the right order, and nobody's capture disturbed. Run with -m gpu."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.processes.content import AXES, LAYOUT, PagedPrompt
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S
from vcache.engine import VCacheEngine
from vcache.engine.lanes import StreamLane

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda:0")
LONG_CYCLES = 200_000_000
"""About 0.1 s of a GPU's clock: longer than anything that a test launches beside it."""


def test_a_copy_runs_behind_the_callers_stream_and_the_caller_behind_it() -> None:
    lane = StreamLane(GPU)
    source, copied = torch.zeros(1 << 20, device=GPU), torch.zeros(1 << 20, device=GPU)
    torch.cuda._sleep(LONG_CYCLES)
    source.fill_(7)
    event = lane.run(lambda: copied.copy_(source), lane.caller())
    event.hold_caller()
    total = copied.sum()
    event.wait()
    assert total.item() == 7 * (1 << 20)


def test_a_copy_does_not_wait_for_what_was_queued_later() -> None:
    lane = StreamLane(GPU)
    source, copied = torch.ones(1 << 20, device=GPU), torch.zeros(1 << 20, device=GPU)
    torch.cuda.synchronize()
    before = lane.caller()
    torch.cuda._sleep(LONG_CYCLES)
    busy = torch.cuda.Event()
    busy.record()
    lane.run(lambda: copied.copy_(source), before).wait()
    assert not busy.query(), "the copy waited for the caller's later work"
    torch.cuda.synchronize()
    assert copied.sum().item() == 1 << 20


@pytest.fixture(scope="module")
def engine() -> Iterator[VCacheEngine]:
    given = {"device": "cuda:0", "segment.size": "64MiB"}
    with Pool() as pool:
        pool.start_server()
        with VCacheEngine(
            layout=LAYOUT, model="gpu", kv_axes=AXES, **{**pool.client_config(), **given}
        ) as made:
            assert made.wait_connected(DEADLINE_S)
            yield made
        pool.check()


def test_an_asynchronous_store_stores_what_the_caller_had_queued(engine: VCacheEngine) -> None:
    count = 4 * LAYOUT.chunk_tokens
    paged, into = (PagedPrompt(1, count, device="cuda:0") for _ in range(2))
    torch.cuda._sleep(LONG_CYCLES)
    paged.fill()
    handle = engine.store_async(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
    assert handle.result(DEADLINE_S) == 4
    loaded = engine.retrieve(paged.tokens, kvcaches=into.kvcaches, slot_mapping=into.slots)
    assert into.wrong_tokens(loaded) == 0
    assert loaded.all()


def test_layers_arrive_before_what_the_caller_queues_after_waiting(engine: VCacheEngine) -> None:
    count = 4 * LAYOUT.chunk_tokens
    paged, into = (PagedPrompt(2, count, device="cuda:0") for _ in range(2))
    paged.fill()
    engine.store(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
    handle = engine.retrieve_async(
        paged.tokens, kvcaches=into.kvcaches, slot_mapping=into.slots, layers_per_event=1
    )
    seen = []
    for layer in range(LAYOUT.num_layers):
        handle.wait_layer(layer, DEADLINE_S)
        seen.append(into.kvcaches[layer].clone())
    assert handle.result(DEADLINE_S).all()
    torch.cuda.synchronize()
    for then, now in zip(seen, into.kvcaches, strict=True):
        assert torch.equal(then.view(torch.int32), now.view(torch.int32))


def test_a_graph_that_another_stream_captures_is_not_disturbed(engine: VCacheEngine) -> None:
    count = 2 * LAYOUT.chunk_tokens
    paged, into = (PagedPrompt(3, count, device="cuda:0") for _ in range(2))
    paged.fill()
    engine.register(paged.kvcaches)
    torch.cuda.synchronize()
    handle = engine.store_async(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
    graph, work = torch.cuda.CUDAGraph(), torch.zeros(1024, device=GPU)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        work.add_(1)
        assert handle.result(DEADLINE_S) == 2
    graph.replay()
    torch.cuda.synchronize()
    assert work.sum().item() == 1024
    loaded = engine.retrieve(paged.tokens, kvcaches=into.kvcaches, slot_mapping=into.slots)
    assert into.wrong_tokens(loaded) == 0


def test_the_current_device_and_stream_stay_as_they_were(engine: VCacheEngine) -> None:
    own = torch.cuda.Stream(GPU)
    paged = PagedPrompt(4, LAYOUT.chunk_tokens, device="cuda:0").fill()
    with torch.cuda.stream(own):
        engine.store(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
        assert torch.cuda.current_stream(GPU) == own
    assert torch.cuda.current_device() == 0
