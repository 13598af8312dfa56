"""What may happen between a step of vLLM's scheduler and its outcome: our halves over vLLM's block pool."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from integration.vllm import keys, loads
from integration.vllm.loads import Failures
from integration.vllm.messages import Report
from tests.vllm.halves import GROUPS, PLACE, Scheduling, made_keys, request_of
from vcache.keys import KeyChain

pytestmark = pytest.mark.usefixtures("hashes")


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


def test_only_who_is_admitted_with_a_load_can_have_hit_it() -> None:
    half = Scheduling()
    before, table = request_of("before", 102), [20, 21, 22, 23, 24, 25, 26]
    half.admit(before, table)
    half.step({"before": table}, before=40)
    half.admit(one := request_of("one", 102), FIRST, 64)
    one.num_computed_tokens = 64
    half.tables_read.clear()
    half.step({"before": table, "one": FIRST}, before=4, one=38)
    assert half.tables_read == ["one", "one"]  # once for what it loads, once for what it computes


@pytest.mark.parametrize("long_ago", [True, False])
def test_a_failure_counts_for_a_while_and_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, long_ago: bool
) -> None:
    if long_ago:
        monkeypatch.setattr(loads, "_FAILED_MISS_S", 0.0)
    failures, request = Failures(), request_of("one", 102)
    for chunk in (3, 2):
        failures.note(GROUPS.hash_of(request, chunk))
    assert failures.first(GROUPS, request, range(6)) == (6 if long_ago else 2)
    assert failures.first(GROUPS, request, range(3, 6)) == (6 if long_ago else 3)
    assert len(failures) == (0 if long_ago else 2)


# -- the block tables, which vLLM copies when they are read


def test_a_block_table_is_read_when_a_chunk_is_complete() -> None:
    half = Scheduling()
    one, table = request_of("one", 102), FIRST
    half.admit(one, table)
    read = []
    for tokens in (15, 1, 8, 40):
        half.tables_read.clear()
        half.step({"one": table}, one=tokens)
        read.append(list(half.tables_read))
    assert read == [[], ["one"], [], ["one"]]


@pytest.mark.parametrize("barred", [True, False])
def test_no_block_table_is_read_when_nothing_is_stored(barred: bool) -> None:
    half = Scheduling(stores=barred)
    one = request_of("one", 102)
    half.admit(one, FIRST)
    if barred:
        assert half.reset()
    half.step({"one": FIRST}, one=102)
    assert half.tables_read == []


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


def test_a_reset_without_a_server_is_made_good_before_anything_is_loaded() -> None:
    half = Scheduling(has_tiers=True)
    one = request_of("one", 102)
    half.new_request(one)
    half.pool.connected = False
    assert half.reset()  # else vLLM would stay paused
    assert half.step({}).forget  # tiers are emptied now
    half.reported(Report(forgotten=1))
    half.answers = [(0, 2), (0, 2)]
    assert half.matched_tokens(one, 0) == (0, False)
    half.pool.connected, half.pool.answers = True, False
    other = request_of("other", 102)
    half.new_request(other)
    assert half.matched_tokens(other, 0) == (0, False) and len(half.answers) == 2
    half.pool.answers = True
    assert half.step({}).forget and half.pool.clears == 1  # also what came down from the pool meanwhile
    third = request_of("third", 102)
    half.new_request(third)
    assert half.matched_tokens(third, 0) == (0, False) and len(half.answers) == 2  # still being forgotten
    half.reported(Report(forgotten=1))
    fourth = request_of("fourth", 102)
    half.new_request(fourth)
    half.matched_tokens(fourth, 0)
    assert len(half.answers) == 1
    half.step({})
    assert half.pool.clears == 1


def test_a_reset_before_the_workers_are_known_is_made_good_when_they_are() -> None:
    half = Scheduling()
    identities, half._keys.identities = half._keys.identities, {}
    assert half.reset()
    half.step({})
    assert half.pool.clears == 0
    half.hear(identities)
    half.step({})
    assert half.pool.clears == 1


def test_chunks_that_cannot_be_ordered_hold_no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    half = Scheduling()
    one, table = request_of("one", 70), [1, 2, 3, 4, 5]
    half.admit(one, table)
    half.step({"one": table}, one=70)
    monkeypatch.setattr(half._keys, "of_all_places", lambda *_: 1 // 0)
    one.num_in_flight_tokens = 0
    with pytest.raises(ZeroDivisionError):  # which the connector keeps from vLLM
        half.reported(Report())
    assert half.pages.pinned == 0 and not half.frees_blocks


def test_a_report_that_one_part_cannot_read_is_heard_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    half = Scheduling(has_tiers=True)
    one, table = request_of("one", 70), [1, 2, 3, 4, 5]
    half.admit(one, table)
    half.step({"one": table}, one=70)
    half._fetches.forget()
    half.step({})
    one.num_in_flight_tokens = 0
    (save,) = half.step({}).saves
    monkeypatch.setattr(half._loads, "reported", lambda *_: 1 // 0)
    half.reported(Report(loads=Counter({1: 1}), saves=Counter({save.id: 1}), forgotten=1))
    assert half.pages.pinned == 0 and not half.busy


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
