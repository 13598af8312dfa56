"""Chunks that only lower tiers have: who orders them, how long a request waits, what a worker brings up."""

from __future__ import annotations

import threading
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from integration.vllm import fetches as fetches_module
from integration.vllm.below import Seen
from integration.vllm.done import Work
from integration.vllm.groups import Group, Groups
from integration.vllm.messages import Fetch, FetchPart, Orders, Report
from tests.vllm.halves import BLOCK, PLACE, Scheduling, request_of

pytestmark = pytest.mark.usefixtures("hashes")


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
    assert len(part.keys[PLACE]) == 4  # chunks 2 to 5
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


def test_nothing_is_fetched_into_a_pool_whose_server_does_not_answer() -> None:
    half = Scheduling(has_tiers=True)
    one = request_of("one", 102)
    half.new_request(one)

    def searched(wanted: Any, within_s: float) -> Any:
        half.pool.connected = False  # the search has found that out
        return begin(wanted, within_s)

    begin, half._searches.begin = half._searches.begin, searched  # type: ignore[method-assign]
    assert ask(half, one) == 0 and fetch_of(half) == []


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


# -- a worker


class Tiers:
    """Stands for Below: what is where, and what was brought."""

    def __init__(self, in_pool: str, below: str) -> None:
        """A letter a chunk: `x` where it is."""
        self.in_pool = tuple(letter == "x" for letter in in_pool)
        self.below = below
        self.asked: list[Any] = []

    def look(self, keys: Any) -> Seen:
        """What there is."""
        self.asked.append(keys)
        there = frozenset(key for key, letter in zip(keys, self.below, strict=True) if letter == "x")
        return Seen(keys, self.in_pool, there, 0)

    def bring(self, seen: Seen, wanted: range, *, within_s: float) -> int:
        """Write down what is brought."""
        keys = [key for key in seen.keys[wanted.start : wanted.stop] if key in seen.below]
        self.asked.append([seen.keys.index(key) for key in keys])
        return len(keys)

    def forget(self) -> None:
        """Write down that it was asked."""
        self.asked.append("forget")

    def close(self) -> None:
        """Nothing to close."""


def keys_of(group: int, count: int) -> tuple[bytes, ...]:
    """A rank's chunks of a group."""
    return tuple(bytes([group, at]) * 16 for at in range(count))


def test_a_worker_brings_up_its_own_chunks_and_says_how_many(working: Any) -> None:
    below = Tiers("x..", ".xx")
    worker = working(below=[below])
    parts = (FetchPart(0, {PLACE: keys_of(0, 3), (0, 1): keys_of(1, 3)}),)
    worker.start_loads(Orders(fetches=[Fetch(7, parts)], forget=True))
    worker.settle()
    worker.results()
    report = worker.report()
    assert [each for each in below.asked if each != "forget"] == [keys_of(0, 3), [1, 2]]
    assert report.fetches == {7: 1} and report.fetched == {7: 2} and report.forgotten == 1


@pytest.mark.parametrize(
    ("full", "window", "brought"),
    [
        # pool and tier; letters of chunks
        (("......", "xxxxx."), ("......", "xxxxxx"), ([0, 1, 2, 3, 4], [3, 4])),  # no more than a window
        (("xx....", "..xxxx"), ("......", "xxxx.."), ([2, 3], [2, 3])),  # where the window's chunks end
        (("xxxxxx", "......"), ("....x.", ".....x"), ([], [5])),  # part of it is in the pool
        (("......", ".xxxxx"), ("......", "xxxxxx"), ([], [])),  # nothing to begin with
    ],
)
def test_a_window_is_brought_up_where_the_hit_ends(
    working: Any, full: tuple[str, str], window: tuple[str, str], brought: tuple[list[int], list[int]]
) -> None:
    groups = Groups(
        (Group(0, BLOCK, 0, ("first",), None), Group(1, BLOCK, 2 * BLOCK, ("second",), None)), BLOCK, BLOCK
    )
    belows = [Tiers(*full), Tiers(*window)]
    worker = working(below=belows, groups=groups)
    parts = tuple(FetchPart(at, {PLACE: keys_of(at, 6)}) for at in range(2))
    worker.start_loads(Orders(fetches=[Fetch(7, parts)]))
    worker.settle()
    worker.results()
    assert tuple(below.asked[1] for below in belows) == brought
    assert worker.report().fetched == {7: sum(map(len, brought))}


def test_a_worker_says_each_time_that_it_has_forgotten(working: Any) -> None:
    worker = working(below=[Tiers("", "")])
    for _ in range(2):
        worker.start_loads(Orders(forget=True))
    worker.settle()
    worker.results()
    assert worker.report().forgotten == 2 and worker._done.running(Work.FETCH) == 0
    worker.start_loads(Orders(forget=True))  # ended: nobody waits
    worker.results()
    assert worker.report().forgotten == 1 and worker._done.running(Work.FETCH) == 0


def test_a_group_whose_tiers_cannot_be_emptied_does_not_keep_those_of_others(working: Any) -> None:
    emptied: list[int] = []

    def fail() -> None:
        raise OSError("no disk")

    groups = Groups(
        (Group(0, BLOCK, 0, ("first",), None), Group(1, BLOCK, 0, ("second",), None)), BLOCK, BLOCK
    )
    belows = [
        SimpleNamespace(forget=fail, close=lambda: None),
        SimpleNamespace(forget=lambda: emptied.append(1), close=lambda: None),
    ]
    worker = working(below=belows, groups=groups)
    worker.start_loads(Orders(forget=True))
    worker.settle()
    worker.results()
    assert emptied == [1] and worker.report().forgotten == 1


def test_steps_wait_a_little_while_tiers_are_emptied(working: Any) -> None:
    go = threading.Event()
    worker = working(below=[SimpleNamespace(forget=lambda: go.wait(30), close=lambda: None)])
    worker.start_loads(Orders(forget=True, idle=True))
    assert worker._done.running(Work.FETCH) == 1
    go.set()
    worker.settle()
    worker.results()
    assert worker.report().forgotten == 1


def test_a_fetch_that_has_waited_too_long_is_given_up(working: Any) -> None:
    worker = working(below=[Tiers("", "")])
    worker._done.begin(Work.FETCH)
    worker._fetcher._fetch(Fetch(7, (FetchPart(0, {PLACE: keys_of(0, 1)}),)), float("-inf"))
    worker.results()
    report = worker.report()
    assert report.fetches == {7: 1} and report.fetched == {7: 0}
    assert worker._counters.snapshot()["failed_tier"] == 0


def test_a_tier_that_fails_is_a_miss(working: Any) -> None:
    def look(keys: Any) -> Seen:
        raise OSError("no disk")

    worker = working(below=[SimpleNamespace(look=look, close=lambda: None)])
    worker.start_loads(Orders(fetches=[Fetch(7, (FetchPart(0, {PLACE: keys_of(0, 1)}),))]))
    worker.settle()
    worker.results()
    report = worker.report()
    assert report.fetches == {7: 1} and report.fetched == {7: 0}
