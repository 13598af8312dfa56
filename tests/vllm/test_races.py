"""What may happen between a step of vLLM's scheduler and its outcome: the real halves, vLLM's real block pool."""

from __future__ import annotations

import secrets
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.request import RequestStatus

from integration.vllm import keys
from integration.vllm.events import StoredEvents
from integration.vllm.groups import Group, Groups
from integration.vllm.keys import ChunkKeys
from integration.vllm.messages import Identity, Load, LoadPart, Orders, Report, Save
from integration.vllm.saves import PagePins
from integration.vllm.scheduler import SchedulerHalf
from integration.vllm.search import Hit, Pinned
from integration.vllm.worker import WorkerHalf, _GroupHalf
from vcache.engine.stats import Counters
from vcache.errors import ArgumentError
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

    def __init__(self, *, private: bool = False) -> None:
        self._groups = GROUPS
        self._settings: Any = SimpleNamespace(store_generated=True, lookup_deadline_ms=5.0)
        self._load_async = False
        self._patience_s = 0.0
        self._loads_at_all = self._stores_at_all = True
        self._ranks = 1
        self._counters = Counters()
        self.observed: Any = SimpleNamespace(add=lambda **counts: None)
        self._client: Any = Pool()
        self._keys = made_keys(private=private)
        self._searches: Any = SimpleNamespace(nothing=found, give_back=lambda grants: None)
        self._pins = PagePins(0.5)
        self._pins.block_pool = BlockPool(64, True, BLOCK)
        self._events = StoredEvents(GROUPS, enabled=False)
        self._chunks_max = 64
        self._tracked = {}
        self._loading = {}
        self._last_load = 0
        self._new_loads: list[Load] = []
        self._new_saves: list[Save] = []
        self._failed = OrderedDict()

    @property
    def blocks(self) -> BlockPool:
        """vLLM's."""
        return self._pins.block_pool  # type: ignore[no-any-return]

    def pages_saved(self) -> set[int]:
        """Pages of all saves that are ordered."""
        return {page for save in self._new_saves for part in save.parts for page in part.pages}

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
    assert half.blocks.get_num_free_blocks() == 63 and half._pins.pinned == 0


def test_what_another_request_computed_upon_a_good_load_is_stored() -> None:
    half = Scheduling()
    one, other, load = two_in_one_step(half, FIRST, SECOND)
    for request in (one, other):
        request.num_in_flight_tokens -= 38
    half.reported(Report(loads=Counter({load: 1})))
    assert half.pages_saved() == {5, 6, 8, 9}


def test_a_request_that_is_admitted_anew_after_a_failed_load_is_stored() -> None:
    half = Scheduling()
    one, other, load = two_in_one_step(half, FIRST, SECOND)
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


# -- a reset


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
    assert half.pages_saved() == set() and half._pins.pinned == 0
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
