"""Streams, events and commits: what is done when a copy was launched, and what only when it has finished."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch

from tests.processes.content import AXES, LAYOUT, PagedPrompt
from tests.processes.pool import Pool
from tests.support.fake_stream import DEADLINE_S, FakeStreams
from vcache.engine import RetrieveHandle, VCacheEngine
from vcache.engine.handles import finished
from vcache.engine.lanes import PAST, HostLane, Lanes, lane_on
from vcache.engine.layerwise import Progress
from vcache.errors import ArgumentError

CHUNK = LAYOUT.chunk_tokens
LAYERS = LAYOUT.num_layers

Result = TypeVar("Result")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> FakeStreams:
    made = FakeStreams()
    monkeypatch.setattr("vcache.engine.lanes.lane_on", made.make)
    return made


@pytest.fixture
def engine(pool: Pool, streams: FakeStreams) -> Iterator[VCacheEngine]:
    """An engine whose copies run when a test says so. Its model is its own: the tests share a server."""
    with make(pool, "lanes") as made:
        yield made
        for stream in streams.made:
            assert not stream.queued, "a copy was left behind"
    pool.observer.clear()


def make(pool: Pool, model: str) -> VCacheEngine:
    given = {"device": "shm:0", "segment.size": "8MiB"}
    made = VCacheEngine(layout=LAYOUT, model=model, kv_axes=AXES, **{**pool.client_config(), **given})
    assert made.wait_connected(DEADLINE_S)
    return made


class InBackground:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.result: object = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(call,))
        self._thread.start()

    def _run(self, call: Callable[[], object]) -> None:
        try:
            self.result = call()
        except Exception as error:
            self.error = error

    @property
    def runs(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(DEADLINE_S)
        assert not self.runs


def stored(engine: VCacheEngine, streams: FakeStreams, seed: int, chunks: int) -> PagedPrompt:
    """A prompt that is in the pool."""
    paged = PagedPrompt(seed, chunks * CHUNK).fill()
    handle = engine.store_async(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
    streams.stores.step()
    assert handle.result(DEADLINE_S) == chunks
    return paged


def begin_load(
    engine: VCacheEngine, paged: PagedPrompt, layers_per_event: int | None = None
) -> RetrieveHandle[torch.Tensor]:
    return engine.retrieve_async(
        paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots, layers_per_event=layers_per_event
    )


# -- stores


def test_a_store_is_committed_when_its_copy_has_finished_and_not_before(
    engine: VCacheEngine, streams: FakeStreams
) -> None:
    paged = PagedPrompt(1, 2 * CHUNK).fill()
    handle = engine.store_async(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
    streams.stores.next()
    assert not handle.done()
    assert engine.lookup(paged.tokens) == 0
    streams.stores.step()
    assert handle.result(DEADLINE_S) == 2
    assert engine.lookup(paged.tokens) == 2 * CHUNK


def test_a_copy_runs_after_what_its_caller_had_queued(engine: VCacheEngine, streams: FakeStreams) -> None:
    paged = PagedPrompt(2, CHUNK).fill()
    first = engine.store_async(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
    queued = streams.stores.next()
    assert queued.after is streams.loads.callers[0]
    assert not queued.end.has_happened
    streams.stores.step()
    assert first.result(DEADLINE_S) == 1
    handle = begin_load(engine, paged)
    assert streams.loads.next().after is streams.loads.callers[1]
    streams.loads.step()
    assert handle.result(DEADLINE_S).all()


def test_a_plain_store_waits_for_its_copy(engine: VCacheEngine, streams: FakeStreams) -> None:
    paged = PagedPrompt(3, CHUNK).fill()
    call = InBackground(lambda: engine.store(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots))
    streams.stores.next()
    assert call.runs
    streams.stores.step()
    call.join()
    assert engine.lookup(paged.tokens) == CHUNK


def test_a_device_fault_commits_nothing_and_gives_the_room_back(
    pool: Pool, engine: VCacheEngine, streams: FakeStreams
) -> None:
    paged = PagedPrompt(4, CHUNK).fill()
    handle = engine.store_async(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
    streams.stores.step(RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        handle.result(DEADLINE_S)
    assert engine.lookup(paged.tokens) == 0
    assert engine.get_stats()["client_reserved"] == 0


# -- retrieves


def test_a_hit_counts_when_its_copy_has_finished(engine: VCacheEngine, streams: FakeStreams) -> None:
    paged = stored(engine, streams, 5, 3)
    into = PagedPrompt(5, 3 * CHUNK)
    handle = begin_load(engine, into)
    streams.loads.next()
    assert not handle.done()
    assert engine.get_stats()["hits"] == 0
    with pytest.raises(TimeoutError, match="not done after"):
        handle.result(0.0)
    streams.loads.step()
    loaded = handle.result(DEADLINE_S)
    assert into.wrong_tokens(loaded) == 0
    assert loaded.all()
    assert engine.lookup(paged.tokens) == 3 * CHUNK


def test_a_model_starts_on_layer_0_while_later_layers_arrive(
    engine: VCacheEngine, streams: FakeStreams
) -> None:
    stored(engine, streams, 6, 2)
    into = PagedPrompt(6, 2 * CHUNK)
    handle = begin_load(engine, into, layers_per_event=1)
    stream = streams.loads
    assert handle.coming(DEADLINE_S).all()
    handle.wait_layer(0, DEADLINE_S)
    first = stream.next(LAYERS)
    assert first.end.holding == [threading.get_ident()]
    assert not first.end.has_happened, "the caller's stream waits for the layer, the caller does not"
    stream.step()
    assert not handle.done()
    for _ in range(LAYERS - 1):
        stream.step()
    loaded = handle.result(DEADLINE_S)
    assert loaded.all()
    assert into.wrong_tokens(loaded) == 0


@pytest.mark.parametrize("layers_per_event", [1, 2, LAYERS, LAYERS + 5])
def test_every_layer_arrives_with_its_range(
    engine: VCacheEngine, streams: FakeStreams, layers_per_event: int
) -> None:
    stored(engine, streams, 7, 1)
    into = PagedPrompt(7, CHUNK)
    handle = begin_load(engine, into, layers_per_event)
    events = -(-LAYERS // layers_per_event)
    streams.loads.next(events)
    for layer in range(LAYERS):
        handle.wait_layer(layer, DEADLINE_S)
    for _ in range(events):
        streams.loads.step()
    assert into.wrong_tokens(handle.result(DEADLINE_S)) == 0


def test_what_is_read_by_layers_is_pinned_until_it_was_read(
    pool: Pool, engine: VCacheEngine, streams: FakeStreams
) -> None:
    stored(engine, streams, 8, 2)
    handle = begin_load(engine, PagedPrompt(8, 2 * CHUNK), layers_per_event=1)
    streams.loads.next(LAYERS)
    assert engine.get_stats()["client_pinned"] == 2
    for _ in range(LAYERS):
        streams.loads.step()
    handle.result(DEADLINE_S)
    assert engine.get_stats()["client_pinned"] == 0


def test_a_launch_that_fails_reaches_all_who_wait_and_ends_the_pin(
    engine: VCacheEngine, streams: FakeStreams
) -> None:
    stored(engine, streams, 9, 1)
    streams.loads.refuse_from = 1
    handle = begin_load(engine, PagedPrompt(9, CHUNK), layers_per_event=1)
    streams.loads.step()
    with pytest.raises(RuntimeError, match="the launch failed"):
        handle.result(DEADLINE_S)
    handle.wait_layer(0)
    with pytest.raises(RuntimeError, match="the launch failed"):
        handle.wait_layer(LAYERS - 1)
    assert engine.get_stats()["client_pinned"] == 0


def test_nothing_found_by_layers_is_nothing_to_wait_for(engine: VCacheEngine) -> None:
    handle = begin_load(engine, PagedPrompt(10, CHUNK), layers_per_event=1)
    assert not handle.coming(DEADLINE_S).any()
    handle.wait_layer(LAYERS - 1, DEADLINE_S)
    assert not handle.result(DEADLINE_S).any()


def test_close_waits_for_copies_that_were_launched(pool: Pool, streams: FakeStreams) -> None:
    engine = make(pool, "closing")
    paged = PagedPrompt(11, CHUNK).fill()
    handle = engine.store_async(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
    streams.stores.next()
    closing = InBackground(engine.close)
    assert not handle.done()
    streams.stores.step()
    closing.join()
    assert handle.result(0.0) == 1


# -- without a GPU, and the parts


def test_without_a_gpu_layers_are_there_when_they_are_waited_for(pool: Pool) -> None:
    with make(pool, "host") as engine:
        paged = PagedPrompt(12, 3 * CHUNK + 2).fill()
        engine.register(paged.kvcaches)
        engine.store(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
        into = PagedPrompt(12, 3 * CHUNK + 2)
        handle = begin_load(engine, into, layers_per_event=1)
        coming = handle.coming(DEADLINE_S)
        handle.wait_layer(LAYERS - 1, DEADLINE_S)
        assert into.wrong_tokens(coming) == 0
        assert torch.equal(handle.result(DEADLINE_S), coming)
        assert int(coming.sum()) == 3 * CHUNK
        whole = begin_load(engine, PagedPrompt(12, 3 * CHUNK))
        whole.wait_layer(0, DEADLINE_S)
        assert whole.coming(DEADLINE_S).all()


@pytest.mark.parametrize("layers", [0, -1, 1.0, True, "1"])
def test_a_wrong_number_of_layers_is_refused(engine: VCacheEngine, layers: int) -> None:
    with pytest.raises(ArgumentError, match="layers_per_event"):
        begin_load(engine, PagedPrompt(13, CHUNK), layers)


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    handle = RetrieveHandle(finished(0), Progress(4, 2), int)
    with pytest.raises(ArgumentError, match="layer"):
        handle.wait_layer(layer)


def test_a_layer_that_was_not_launched_in_time() -> None:
    handle = RetrieveHandle(finished(0), Progress(4, 2), int)
    with pytest.raises(TimeoutError, match="not launched after"):
        handle.wait_layer(3, 0.0)


def test_a_cpu_copies_at_once_and_behind_what_it_is_told() -> None:
    lane = lane_on(torch.device("cpu"))
    assert isinstance(lane, HostLane)
    done: list[int] = []
    assert lane.caller() is PAST
    assert lane.run(lambda: done.append(1), PAST) is PAST
    assert done == [1]


def test_a_device_has_one_lane() -> None:
    lanes = Lanes()
    cpu = torch.device("cpu")
    assert lanes.on(cpu) is lanes.on(cpu)
