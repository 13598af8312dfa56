"""Kernels, streams and events on a GPU: the same bits, the right order, nobody's capture disturbed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels_common import (
    DTYPES,
    LATENT_AXES,
    TOKEN_AXES,
    bits,
    chunks_for,
    latent_layout,
    same,
    tensors,
    token_layout,
)
from tests.processes.content import AXES, LAYOUT, PagedPrompt
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S
from tests.test_kernels import ORDERS, PAGE_AXES, PAGE_ORDERS, page_layout
from vcache.engine import VCacheEngine
from vcache.engine.lanes import PAST, StreamLane
from vcache.kernels import (
    LaunchOptions,
    PagedKV,
    copy_engine,
    gather_pages,
    gather_tokens,
    prepare,
    reference,
    scatter_pages,
    scatter_tokens,
)
from vcache.layout import KVLayout

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda:0")
LONG_CYCLES = 200_000_000
"""About 0.1 s of a GPU's clock: longer than anything that a test launches beside it."""


def on_gpu(kvcaches: list[torch.Tensor], axes: str, layout: KVLayout) -> PagedKV:
    return PagedKV.from_tensors([tensor.to(GPU) for tensor in kvcaches], axes, layout)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("axes", [*TOKEN_AXES, *LATENT_AXES])
def test_tokens_equal_the_definition(axes: str, order: str) -> None:
    layout = latent_layout() if axes in LATENT_AXES else token_layout()
    check_tokens(axes, layout, ORDERS[order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [0, 1, 7])
def test_every_dtype_with_and_without_a_limit(dtype: str, limit: int) -> None:
    check_tokens("phs(kd)", token_layout(dtype), ORDERS["holes"], LaunchOptions(sm_limit=limit))


def check_tokens(
    axes: str, layout: KVLayout, slots: torch.Tensor, options: LaunchOptions | None = None
) -> None:
    options = options or LaunchOptions()
    kvcaches, others = tensors(axes, layout), tensors(axes, layout, 50)
    plain, target = (PagedKV.from_tensors(each, axes, layout) for each in (kvcaches, others))
    paged, loaded = on_gpu(kvcaches, axes, layout), on_gpu(others, axes, layout)
    wanted = chunks_for(plain, len(slots))
    chunks = [chunk.to(GPU) for chunk in wanted]
    gather_tokens(paged, slots, chunks, None, options)
    reference.gather(plain, slots, wanted)
    assert same([chunk.cpu() for chunk in chunks], wanted)
    scatter_tokens(loaded, slots.to(GPU), chunks, None, options)
    reference.scatter(target, slots, wanted)
    assert same([layer.cpu() for layer in loaded.layers], bits(target))


@pytest.mark.parametrize("order", PAGE_ORDERS)
@pytest.mark.parametrize("axes", PAGE_AXES)
@pytest.mark.parametrize("by", ["kernel", "copy engine"])
def test_pages_equal_the_definition(axes: str, order: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_engine, "PIECE_BYTES_MIN", 1 if by == "copy engine" else 1 << 40)
    layout, kvcaches = page_layout(axes)
    pages = PAGE_ORDERS[order]
    plain, target = (
        PagedKV.from_tensors([tensor.clone() for tensor in kvcaches], axes, layout) for _ in range(2)
    )
    paged, loaded = (on_gpu(kvcaches, axes, layout) for _ in range(2))
    wanted = chunks_for(plain, len(pages) * layout.page_tokens)
    chunks = [chunk.to(GPU) for chunk in wanted]
    gather_pages(paged, pages, chunks)
    reference.gather(plain, pages, wanted)
    assert same([chunk.cpu() for chunk in chunks], wanted)
    scatter_pages(loaded, pages.flip(0), chunks)
    reference.scatter(target, pages.flip(0), wanted)
    assert same([layer.cpu() for layer in loaded.layers], bits(target))


def test_no_kernel_is_compiled_after_registration() -> None:
    from vcache.kernels.triton_copy import copy_words

    paged = on_gpu(tensors("kpshd", token_layout()), "kpshd", token_layout())
    prepare(paged)
    compiled = len(copy_words.device_caches[0][0])
    for slots in (
        ORDERS["page order"],
        ORDERS["holes"],
        ORDERS["one token"],
        ORDERS["a partial chunk at random"],
    ):
        for options in (LaunchOptions(), LaunchOptions(sm_limit=16)):
            chunks = [chunk.to(GPU) for chunk in chunks_for(paged, len(slots))]
            gather_tokens(paged, slots, chunks, None, options)
            scatter_tokens(paged, slots, chunks, range(1, 2), options)
    assert len(copy_words.device_caches[0][0]) == compiled


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


def test_past_events_hold_nobody() -> None:
    PAST.hold_caller()
    PAST.wait()
