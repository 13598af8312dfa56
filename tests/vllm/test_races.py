"""What may happen between a step of vLLM's scheduler and its outcome: our halves over vLLM's block pool."""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.request import RequestStatus

from integration.vllm import fetches as fetches_module
from integration.vllm import identity, keys
from integration.vllm import worker as worker_module
from integration.vllm.events import StoredEvents
from integration.vllm.groups import Group, Groups
from integration.vllm.keys import ChunkKeys
from integration.vllm.messages import (
    Fetch,
    FetchPart,
    Identity,
    Load,
    LoadPart,
    Orders,
    Report,
    Save,
    SavePart,
)
from integration.vllm.saves import PagePins
from integration.vllm.scheduler import SchedulerHalf
from integration.vllm.search import Hit, Pinned
from integration.vllm.settings import Settings
from integration.vllm.worker import WorkerHalf, _GroupHalf
from vcache.engine.stats import Counters
from vcache.errors import ArgumentError
from vcache.keys import KeyChain
from vcache.protocol import EXTENT

BLOCK = 16
PLACE = (0, 0)
GROUPS = Groups((Group(0, BLOCK, 0, ("first", "second"), None),), BLOCK, BLOCK)


class Pool:
    """Stands for the metadata server: there, and empty."""

    connected = True

    def clear(self, namespace: bytes) -> int:
        """Nothing was there."""
        return 0


class Scheduling(SchedulerHalf):
    """The scheduler's half over vLLM's block pool; its searches find what the test says."""

    def __init__(self, *, private: bool = False, has_tiers: bool = False, load_async: bool = False) -> None:
        self.pool: Any = Pool()
        self.pages = PagePins(0.5, BlockPool(64, True, BLOCK))
        self.answers: list[tuple[int, int]] = []
        searches: Any = SimpleNamespace(nothing=found, begin=self._begin)
        super().__init__(
            self.pool,
            GROUPS,
            made_keys(private=private),
            searches,
            Settings(lookup_deadline_ms=0),
            Counters(),
            pins=self.pages,
            events=StoredEvents(GROUPS, enabled=False),
            ranks=1,
            load_async=load_async,
            has_tiers=has_tiers,
        )
        self.saves: list[Save] = []

    def _begin(self, wanted: Any) -> Future[Pinned]:
        """A search, answered at once: with the chunks that `answers` says next, else with nothing."""
        done: Future[Pinned] = Future()
        done.set_result(found(*(self.answers.pop(0) if self.answers else (wanted.first,))))
        return done

    @property
    def blocks(self) -> BlockPool:
        """vLLM's."""
        return self.pages.block_pool  # type: ignore[no-any-return]

    def pages_saved(self) -> set[int]:
        """Pages of all saves that are ordered and no step has taken along."""
        self.saves += self._captures.take_orders()
        return {page for save in self.saves for part in save.parts for page in part.pages}

    def admit(self, request: Any, table: list[int], external_tokens: int = 0) -> None:
        """A request arrives and is given blocks."""
        if request.request_id not in self._tracked:
            self.new_request(request)
        if external_tokens:
            self._tracked[request.request_id].pinned = found(0, external_tokens // BLOCK)
        self.allocated(request, (table,), external_tokens)

    def cache(self, request: Any, table: list[int], count: int) -> None:
        """vLLM's prefix cache has the first blocks of a request."""
        blocks = [self.blocks.blocks[page] for page in table]
        self.blocks.cache_full_blocks(request, blocks, 0, count, BLOCK, 0)

    def cached(self, request: Any, count: int) -> list[bool]:
        """Which of the first blocks of a request vLLM's prefix cache has."""
        cached = self.blocks.cached_block_hash_to_block
        found = (make_block_hash_with_group_id(each, 0) for each in request.block_hashes[:count])
        return [cached.get_one_block(each) is not None for each in found]

    def step(self, tables: dict[str, list[int]], **tokens: int) -> Orders:
        """vLLM has scheduled so many tokens of these requests."""
        state = SimpleNamespace(get_block_ids=lambda request: (tables[request],))
        orders = self.orders(
            SimpleNamespace(
                total_num_scheduled_tokens=sum(tokens.values()),
                num_scheduled_tokens=tokens,
                kv_connector_block_state=state,
            )
        )
        self.saves = []
        for name, count in tokens.items():
            request = self._tracked[name].request
            request.num_computed_tokens += count
            request.num_in_flight_tokens += count
        return orders


def made_keys(*, private: bool = False) -> ChunkKeys:
    """Keys of one rank."""
    made = object.__new__(ChunkKeys)
    made._vllm_config, made._groups, made._places = None, GROUPS, {PLACE}
    made._private = private
    made._nonce = secrets.token_bytes(16) if private else b""
    made._chains, made._loras = {}, {}
    made.identities = {PLACE: Identity(PLACE, "model", (b"f" * 16,), ("identity",), (64,))}
    return made


def found(first: int, end: int | None = None) -> Pinned:
    """A hit, without pins."""
    end = first if end is None else end
    searches: Any = SimpleNamespace(give_back=lambda grants: None)
    return Pinned(searches, Hit(first, end, {(PLACE, 0): np.zeros(end - first, EXTENT)}, 1), [])


def request_of(name: str, tokens: int) -> Any:
    """A request whose prompt begins as all others do."""
    return SimpleNamespace(
        request_id=name,
        num_tokens=tokens,
        num_prompt_tokens=tokens,
        num_computed_tokens=0,
        num_in_flight_tokens=0,
        status=RequestStatus.RUNNING,
        block_hashes=[bytes([at]) * 32 for at in range(tokens // BLOCK)],
        lora_request=None,
        skip_reading_prefix_cache=False,
        all_token_ids=list(range(tokens)),
    )


@pytest.fixture(autouse=True)
def _hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "hashing", lambda config: (b"algorithm", b"seed"))


# -- a failed load, of which others have hit the blocks


def two_in_one_step(
    half: Scheduling, first_table: list[int], second_table: list[int]
) -> tuple[Any, Any, int]:
    """A request loads four chunks; another one hits them in the same call of schedule(), as vLLM caches them
    when they are allocated.
    """
    one, other = request_of("one", 102), request_of("other", 102)
    half.admit(one, first_table, 64)
    half.cache(one, first_table, 6)
    half.admit(other, second_table)
    one.num_computed_tokens = other.num_computed_tokens = 64
    orders = half.step({"one": first_table, "other": second_table}, one=38, other=38)
    return one, other, orders.loads[0].id


def fail(half: Scheduling, load: int, chunk: int) -> None:
    """The worker says that the load did not bring this chunk."""
    half.reported(Report(loads=Counter({load: 1}), failed={load: chunk}))


FIRST, SECOND = [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 8, 9, 10]


def test_what_another_request_hit_of_a_failed_load_is_not_stored_when_vllm_recomputes() -> None:
    half = Scheduling()
    one, other, load = two_in_one_step(half, FIRST, SECOND)
    for request in (one, other):
        request.num_in_flight_tokens -= 38
    one.num_computed_tokens, other.num_computed_tokens = 16, 64  # as vLLM's scheduler truncates them
    fail(half, load, 1)
    assert half.pages_saved() == set()
    half.step({"one": FIRST, "other": SECOND}, one=86, other=38)
    for request in (one, other):
        request.num_in_flight_tokens = 0
    half.reported(Report())
    assert half.pages_saved() == {2, 3, 4, 5, 6}  # its own, computed anew; nothing of the other one
    half.finished(other, (SECOND,))
    assert half.pages_saved() == {2, 3, 4, 5, 6}


def test_what_another_request_hit_of_a_failed_load_is_not_stored_when_vllm_ends_it() -> None:
    half = Scheduling()
    one, other, load = two_in_one_step(half, FIRST, SECOND)
    one.num_computed_tokens, other.num_computed_tokens = 16, 64
    for request, table in ((one, FIRST), (other, SECOND)):
        request.num_in_flight_tokens -= 38
        request.status = RequestStatus.FINISHED_ERROR
        half.finished(request, (table,))
    fail(half, load, 1)
    assert half.pages_saved() == set()
    assert half.blocks.get_num_free_blocks() == 63 and half.pages.pinned == 0


def test_what_another_request_computed_upon_a_good_load_is_stored() -> None:
    half = Scheduling()
    one, other, load = two_in_one_step(half, FIRST, SECOND)
    for request in (one, other):
        request.num_in_flight_tokens -= 38
    half.reported(Report(loads=Counter({load: 1})))
    assert half.pages_saved() == {5, 6, 8, 9}


def test_a_request_that_is_admitted_anew_after_a_failed_load_is_stored() -> None:
    half = Scheduling()
    _, other, load = two_in_one_step(half, FIRST, SECOND)
    fail(half, load, 0)
    other.num_computed_tokens = other.num_in_flight_tokens = 0
    table = [20, 21, 22, 23, 24, 25, 26]
    half.admit(other, table)
    half.step({"other": table}, other=102)
    other.num_in_flight_tokens = 0
    half.reported(Report())
    assert set(table[:6]) <= half.pages_saved()


# -- a failed load in vLLM's own prefix cache


@pytest.mark.parametrize("aborted", [True, False])
def test_vllm_does_not_find_a_failed_load_in_its_own_cache(aborted: bool) -> None:
    half = Scheduling()
    one = request_of("one", 102)
    half.admit(one, FIRST, 64)
    half.cache(one, FIRST, 6)
    one.num_computed_tokens = 64
    load = half.step({"one": FIRST}, one=38).loads[0].id
    assert half.cached(one, 6) == [True] * 6
    if aborted:  # while the step runs: vLLM frees the blocks before it hears of the failure
        one.status = RequestStatus.FINISHED_ABORTED
        half.finished(one, (FIRST,))
    fail(half, load, 1)
    assert half.cached(one, 6) == [True] + [False] * 5


def test_vllm_keeps_a_good_load_in_its_own_cache() -> None:
    half = Scheduling()
    one = request_of("one", 102)
    half.admit(one, FIRST, 64)
    half.cache(one, FIRST, 6)
    one.num_computed_tokens = 64
    load = half.step({"one": FIRST}, one=38).loads[0].id
    half.reported(Report(loads=Counter({load: 1})))
    assert half.cached(one, 6) == [True] * 6


def async_load(half: Scheduling, tokens: int) -> tuple[Any, int]:
    """A request waits for so many tokens."""
    one = request_of("one", 102)
    half.admit(one, FIRST, tokens)
    one.num_computed_tokens = tokens
    return one, half.step({"one": FIRST}).loads[0].id


def test_an_asynchronous_load_that_failed_was_no_hit() -> None:
    half = Scheduling(load_async=True)
    one, load = async_load(half, 64)
    fail(half, load, 2)
    taken = half.observed.take()
    assert taken is not None and taken.data["failed_loads"] == 1 and not taken.data.get("hit_tokens")
    one.num_computed_tokens = 0  # vLLM takes nothing of it, and asks anew
    half.answers = [(0, 2)]
    assert half.matched_tokens(one, 0) == (32, True)
    half.allocated(one, (FIRST,), 32)
    half.reported(Report(loads=Counter({half.step({"one": FIRST}).loads[0].id: 1})))
    taken = half.observed.take()
    assert taken is not None and taken.data["hit_tokens"] == 32


# -- a reset


def test_keys_that_are_made_during_a_reset_are_not_found_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made, hashes = made_keys(private=True), request_of("one", 102).block_hashes

    def chain(*arguments: Any) -> KeyChain:
        if not made._chains and not rotated:
            rotated.append(True)
            made.rotate()  # in another thread
        return KeyChain(*arguments)

    rotated: list[bool] = []
    monkeypatch.setattr(keys, "KeyChain", chain)
    before = made.keys(hashes, [0], 0, PLACE, "")
    assert rotated and made.keys(hashes, [0], 0, PLACE, "") != before


@pytest.mark.parametrize("private", [True, False])
def test_what_was_computed_before_a_reset_is_not_stored_after_it(private: bool) -> None:
    half = Scheduling(private=private)
    one, table = request_of("one", 70), [1, 2, 3, 4, 5]
    half.admit(one, table)
    half.step({"one": table}, one=32)
    assert half.reset()
    one.num_in_flight_tokens = 0
    half.reported(Report())
    half.step({"one": table}, one=38)
    one.num_in_flight_tokens = 0
    half.reported(Report())
    assert half.pages_saved() == set() and half.pages.pinned == 0
    one.num_computed_tokens = 0  # preempted, and admitted anew
    half.admit(one, table)
    half.step({"one": table}, one=70)
    one.num_in_flight_tokens = 0
    half.reported(Report())
    assert half.pages_saved() == {1, 2, 3, 4}


@pytest.mark.parametrize("private", [True, False])
def test_a_reset_cannot_be_promised_during_a_load(private: bool) -> None:
    half = Scheduling(private=private)
    one = request_of("one", 102)
    half.admit(one, FIRST, 64)
    one.num_computed_tokens = 64
    load = half.step({"one": FIRST}, one=38).loads[0].id
    assert not half.reset()
    one.num_in_flight_tokens = 0
    half.reported(Report(loads=Counter({load: 1})))
    assert half.pages_saved() == {5, 6}  # what it refused changed nothing


# -- lower tiers


def ask(half: Scheduling, request: Any) -> int | None:
    """What vLLM's scheduler is told."""
    return half.matched_tokens(request, 0)[0]


def fetch_of(half: Scheduling) -> list[Fetch]:
    """What an empty step orders to be brought up."""
    return half.step({}).fetches


def brought(half: Scheduling, fetch: int, chunks: int) -> None:
    """The worker has looked below."""
    half.reported(Report(fetches=Counter({fetch: 1}), fetched=Counter({fetch: chunks})))


def test_what_the_pool_lacks_is_brought_up_before_the_request_is_told() -> None:
    half = Scheduling(has_tiers=True)
    one = request_of("one", 102)
    half.new_request(one)
    half.answers = [(0, 2), (0, 5)]
    assert ask(half, one) is None
    (fetch,) = fetch_of(half)
    (part,) = fetch.parts
    assert part.leading and len(part.keys[PLACE]) == 4  # chunks 2 to 5
    assert ask(half, one) is None  # it is not known yet
    assert fetch_of(half) == []
    brought(half, fetch.id, 3)
    assert ask(half, one) is None  # five chunks are there now; and the sixth?
    (further,) = fetch_of(half)
    brought(half, further.id, 0)
    assert ask(half, one) == 5 * BLOCK
    assert ask(half, one) == 5 * BLOCK and fetch_of(half) == []


def test_what_is_nowhere_is_looked_for_once() -> None:
    half = Scheduling(has_tiers=True)
    one = request_of("one", 102)
    half.new_request(one)
    assert ask(half, one) is None
    (fetch,) = fetch_of(half)
    brought(half, fetch.id, 0)
    assert ask(half, one) == 0
    assert ask(half, one) == 0 and fetch_of(half) == []


def test_without_lower_tiers_a_request_is_told_at_once() -> None:
    half = Scheduling()
    one = request_of("one", 102)
    half.new_request(one)
    half.answers = [(0, 2)]
    assert ask(half, one) == 2 * BLOCK and fetch_of(half) == []


def test_nothing_is_fetched_after_a_reset_before_the_tiers_are_empty() -> None:
    half = Scheduling(has_tiers=True)
    one, other = request_of("one", 102), request_of("other", 102)
    assert half.reset() and half.busy
    assert half.step({}).forget
    half.new_request(one)
    assert ask(half, one) == 0 and fetch_of(half) == []
    half.reported(Report(forgotten=1))
    assert not half.busy
    half.new_request(other)
    assert ask(half, other) is None and len(fetch_of(half)) == 1


def test_tiers_that_are_to_be_emptied_twice_are_not_asked_in_between() -> None:
    half = Scheduling(has_tiers=True)
    assert half.reset() and half.step({}).forget
    assert half.reset() and half.step({}).forget
    half.reported(Report(forgotten=1))  # the first time; what was stored in between is still there
    one = request_of("one", 102)
    half.new_request(one)
    assert half.busy and ask(half, one) == 0 and fetch_of(half) == []
    half.reported(Report(forgotten=1))
    assert not half.busy


def test_a_reset_takes_back_what_was_to_be_fetched() -> None:
    half = Scheduling(has_tiers=True)
    one = request_of("one", 102)
    half.new_request(one)
    assert ask(half, one) is None
    assert half.reset()
    orders = half.step({})
    assert orders.forget and orders.fetches == []
    assert ask(half, one) == 0


def test_what_a_full_pool_loses_again_is_not_brought_up_for_ever() -> None:
    half = Scheduling(has_tiers=True)
    one = request_of("one", 102)
    half.new_request(one)
    half.answers = [(0, at) for at in (0, 3, 0, 3, 0, 3)]  # whatever comes up, something else has to go
    rounds = 0
    while ask(half, one) is None:
        for fetch in fetch_of(half):
            rounds += 1
            assert rounds < 6
            brought(half, fetch.id, 1)


def test_a_request_waits_once_for_all_that_is_below(monkeypatch: pytest.MonkeyPatch) -> None:
    half, now_s = Scheduling(has_tiers=True), [0.0]
    monkeypatch.setattr(fetches_module, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    one = request_of("one", 102)
    half.new_request(one)
    half.answers = [(0, at) for at in range(6)]  # a slow tier: a chunk at a time
    while ask(half, one) is None:
        now_s[0] += 0.9
        assert now_s[0] < 3, "that is more than fetch_deadline_ms, and a round"
        for fetch in fetch_of(half):
            brought(half, fetch.id, 1)


@pytest.mark.parametrize("answers", [True, False])
def test_a_fetch_that_a_long_step_carries_is_waited_for(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, now_s = Scheduling(has_tiers=True), [0.0]
    monkeypatch.setattr(fetches_module, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    one = request_of("one", 102)
    half.new_request(one)
    half.answers = [(0, 0), (0, 6)] if answers else []
    assert ask(half, one) is None
    (fetch,) = fetch_of(half)
    now_s[0] = 60  # others were computed; only then the worker begins
    assert ask(half, one) is None
    half.step({})
    assert ask(half, one) is None
    half.step({})
    if answers:
        brought(half, fetch.id, 6)
    assert ask(half, one) == (6 * BLOCK if answers else 0)


def test_emptying_tiers_frees_no_blocks() -> None:
    half = Scheduling(has_tiers=True)
    assert half.reset()
    assert half.busy and not half.frees_blocks


def test_a_request_that_ends_waits_for_nothing() -> None:
    half = Scheduling(has_tiers=True)
    one = request_of("one", 102)
    half.new_request(one)
    assert ask(half, one) is None
    (fetch,) = fetch_of(half)
    half.finished(one, ([],))
    brought(half, fetch.id, 3)
    assert not half.busy


def test_a_worker_brings_up_its_own_chunks_and_says_how_many(working: Any) -> None:
    asked: list[Any] = []

    def bring(keys: Any, *, leading: bool, within_s: float) -> int:
        asked.append((keys, leading))
        return 2

    below = SimpleNamespace(bring=bring, forget=lambda: asked.append("forget"), close=lambda: None)
    worker = working(below=below)
    mine, others = (b"k" * 32, b"l" * 32), (b"m" * 32,)
    parts = (FetchPart(0, {PLACE: mine, (0, 1): others}, True),)
    worker.start_loads(Orders(fetches=[Fetch(7, parts)], forget=True))
    worker.settle()
    worker.results()
    report = worker.report()
    assert asked == [(mine, True), "forget"] or asked == ["forget", (mine, True)]
    assert report.fetches == {7: 1} and report.fetched == {7: 2} and report.forgotten == 1


def test_a_worker_says_each_time_that_it_has_forgotten(working: Any) -> None:
    worker = working(below=SimpleNamespace(forget=lambda: None, close=lambda: None))
    for _ in range(2):
        worker.start_loads(Orders(forget=True))
    worker.settle()
    worker.results()
    assert worker.report().forgotten == 2 and worker._fetches_running == 0
    worker.start_loads(Orders(forget=True))  # ended: nobody waits
    worker.results()
    assert worker.report().forgotten == 1 and worker._fetches_running == 0


def test_steps_wait_a_little_while_tiers_are_emptied(working: Any) -> None:
    go = threading.Event()
    worker = working(below=SimpleNamespace(forget=lambda: go.wait(30), close=lambda: None))
    worker.start_loads(Orders(forget=True, idle=True))
    assert worker._fetches_running == 1
    go.set()
    worker.settle()
    worker.results()
    assert worker.report().forgotten == 1


def test_a_fetch_that_has_waited_too_long_is_given_up(working: Any) -> None:
    worker = working(below=SimpleNamespace(close=lambda: None))
    worker._fetches_running += 1
    worker._fetch(Fetch(7, (FetchPart(0, {PLACE: (b"k" * 32,)}, True),)), float("-inf"))
    worker.results()
    report = worker.report()
    assert report.fetches == {7: 1} and report.fetched == {7: 0}
    assert worker._counters.snapshot()["failed_tier"] == 0


def test_a_tier_that_fails_is_a_miss(working: Any) -> None:
    def bring(keys: Any, *, leading: bool, within_s: float) -> int:
        raise OSError("no disk")

    worker = working(below=SimpleNamespace(bring=bring, close=lambda: None))
    worker.start_loads(Orders(fetches=[Fetch(7, (FetchPart(0, {PLACE: (b"k" * 32,)}, True),))]))
    worker.settle()
    worker.results()
    report = worker.report()
    assert report.fetches == {7: 1} and report.fetched == {7: 0}


# -- a worker's copies


class Lane:
    """A lane whose events the test tells apart, or which fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.events: list[object] = []
        self.error = error

    def on(self, device: Any) -> Lane:
        """Of any device."""
        return self

    def caller(self) -> Any:
        """A new event each time."""
        if self.error is not None:
            raise self.error
        self.events.append(object())
        return self.events[-1]


class Working(WorkerHalf):
    """The worker's half over a copy that only writes down what it was asked for."""

    def __init__(self, *, layerwise: bool = False, lane: Lane | None = None, below: Any = None) -> None:
        kv_cache_config: Any = SimpleNamespace(num_blocks=64)
        configured: Any = SimpleNamespace(settings=Settings(layerwise=layerwise))
        super().__init__(None, kv_cache_config, GROUPS, configured)
        self.lane = lane or Lane()
        self.below = below
        self._lanes: Any = self.lane
        self.transfers: list[Any] = []
        self.held = threading.Event()
        self.held.set()
        layout = SimpleNamespace(chunk_bytes=64, pages_per_chunk=1)
        paged = SimpleNamespace(layout=layout, device=None, layers=[0])
        pages: Any = SimpleNamespace(paged=paged, layer_names=("first", "second"))
        self._halves = [_GroupHalf(pages, self, self, self.below)]  # type: ignore[arg-type]

    def settle(self) -> None:
        """Return when all that was to be fetched is."""
        self._fetcher.shutdown(wait=True)

    def run(self, transfer: Any, extents: bytes = b"", lineage: int = 0, on_layer: Any = None) -> Any:
        """Stands for GrantedLoads, whose first chunk does not arrive, and for Store."""
        assert self.held.wait(30)
        self.transfers.append(transfer)
        return [False] * len(transfer.keys) if extents else len(transfer.keys)


@pytest.fixture
def working() -> Iterator[Any]:
    """Make workers' halves; their threads end with the test."""
    made: list[Working] = []

    def make(**how: Any) -> Working:
        made.append(Working(**how))
        return made[-1]

    yield make
    for worker in made:
        worker.held.set()
        worker.close()


LOAD = Load(1, "one", False, 1, {PLACE: (LoadPart(0, (2, 3), (5, 6), b"extents"),)})
SAVE = Save(1, (SavePart(0, {PLACE: (b"k" * 16,)}, (7,)),))


def test_copies_wait_for_what_the_model_had_queued(working: Any) -> None:
    worker = working()
    worker.start_loads(Orders(loads=[LOAD]))
    worker.start_saves(Orders(saves=[SAVE]))
    worker.close()
    assert [transfer.after for transfer in worker.transfers] == worker.lane.events
    assert len(worker.lane.events) == 2


def test_a_failure_layer_by_layer_is_heard_with_its_step(working: Any) -> None:
    worker = working(layerwise=True)
    worker.held.clear()
    worker.start_loads(Orders(loads=[LOAD]))
    asked = ThreadPoolExecutor(1).submit(worker.results)  # before wait_for_save, as with a speculator
    worker.held.set()
    asked.result(30)
    assert worker.bad_blocks() == {5, 6}
    assert worker.report().failed == {1: 2}


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("ended", [True, False])
def test_a_load_that_cannot_begin_has_failed_and_nobody_waits(
    working: Any, layerwise: bool, ended: bool
) -> None:
    worker = working(layerwise=layerwise, lane=Lane(None if ended else RuntimeError("no event")))
    if ended:
        worker.close()
    worker.start_loads(Orders(loads=[LOAD]))
    worker.wait_for_layer("first")
    worker.wait_for_layer("second")
    worker.start_saves(Orders(saves=[SAVE]))
    worker.results()
    assert worker.bad_blocks() == {5, 6}
    report = worker.report()
    assert report.loads == {1: 1} and report.failed == {1: 2}
    assert report.saves == {1: 1} and report.stored[1] == 0
    assert worker._loads_running == worker._saves_running == 0


def test_segments_are_mapped_again_at_times(working: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def mapped(again_s: float) -> int:
        monkeypatch.setattr(worker_module, "_MAP_AGAIN_S", again_s)
        worker, calls = working(), []
        worker._client = SimpleNamespace(epoch=3, map_segments=lambda: calls.append(1), close=lambda: None)
        worker.start_loads(Orders())
        worker.start_loads(Orders())
        worker.close()
        return len(calls)

    assert mapped(0.0) == 2
    assert mapped(3600.0) == 1


# -- adapters


def adapter_of(name: str, number: int = 1) -> Any:
    """A request with this adapter."""
    request = request_of(f"{name}-{number}", 70)
    request.lora_request = SimpleNamespace(lora_int_id=number, lora_path=name, load_inplace=False)
    return request


def adapter_files(folder: Path, weights: bytes) -> str:
    """An adapter on the disk."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return str(folder)


def test_an_adapter_without_files_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    half = Scheduling()
    request, table = adapter_of("somebody/adapter-that-is-nowhere"), [1, 2, 3, 4, 5]
    half.admit(request, table)
    assert half.matched_tokens(request, 0) == (0, False)
    assert request.request_id not in half._tracked


def test_an_adapter_of_the_hub_counts_by_its_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = adapter_files(tmp_path / "snapshot", b"weights")
    monkeypatch.setattr(identity, "_snapshot", lambda name, revision: place)
    made = made_keys()
    assert made.adapter(adapter_of("somebody/adapter")) == made.adapter(adapter_of(place))


def test_an_adapter_whose_files_change_is_not_shared_under_its_number(tmp_path: Path) -> None:
    made = made_keys()
    place = adapter_files(tmp_path / "adapter", b"weights")
    before = made.adapter(adapter_of(place))
    assert made.adapter(adapter_of(place)) == before
    adapter_files(tmp_path / "adapter", b"other weights")
    with pytest.raises(ArgumentError, match="lora_path"):
        made.adapter(adapter_of(place))
    assert made.adapter(adapter_of(place, number=2)) != before
