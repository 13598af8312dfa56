"""Deadline and circuit breaker around a lower tier: the test moves the clock, and lets calls go."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.processes.worker import DEADLINE_S, eventually
from vcache.engine.lower import LowerTiers, ttl_left_ms
from vcache.engine.stats import Counters
from vcache.engine.tier_breaker import TierBreaker
from vcache.engine.tier_calls import TierCalls
from vcache.limits import TIER_FAILURES_MAX, TIER_PAUSE_MAX_S, TIER_PAUSE_MIN_S, TTL_MS_MAX
from vcache.tiers import Found, MemoryTier

LAYOUT = b"L" * 16


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


class HangingTier(MemoryTier):
    """A tier whose reads and writes wait until the test lets them go."""

    def __init__(self) -> None:
        super().__init__(1 << 20, "hanging")
        self.go = threading.Event()
        self.inside = threading.Semaphore(0)

    def get(self, key: bytes, into: torch.Tensor, layout: bytes) -> Found | None:
        self.inside.release()
        assert self.go.wait(DEADLINE_S)
        return super().get(key, into, layout)

    def put(self, key: bytes, chunk: torch.Tensor, layout: bytes, expires_ms: int = 0) -> bool:
        self.inside.release()
        assert self.go.wait(DEADLINE_S)
        return super().put(key, chunk, layout, expires_ms)


@pytest.fixture
def tier() -> Iterator[HangingTier]:
    made = HangingTier()
    yield made
    made.go.set()


# ------------------------------------------------------------------------------------------ the breaker


def test_some_failures_in_sequence_open_it_and_one_call_tries_again() -> None:
    breaker = TierBreaker()
    for _ in range(TIER_FAILURES_MAX - 1):
        assert breaker.admits(0.0)
        breaker.failed(0.0, late=False)
    assert breaker.would_admit(0.0)
    breaker.failed(0.0, late=False)
    assert not breaker.would_admit(0.0)
    assert not breaker.admits(TIER_PAUSE_MIN_S / 2)
    assert breaker.admits(TIER_PAUSE_MIN_S)
    assert not breaker.admits(TIER_PAUSE_MIN_S), "one at a time"
    assert not breaker.would_admit(TIER_PAUSE_MIN_S)
    breaker.succeeded()
    assert breaker.would_admit(0.0) and breaker.admits(TIER_PAUSE_MIN_S)


def test_a_success_in_between_begins_the_count_anew() -> None:
    breaker = TierBreaker()
    for _ in range(5 * TIER_FAILURES_MAX):
        breaker.failed(0.0, late=False)
        breaker.succeeded()
    assert breaker.would_admit(0.0)


def test_one_late_call_opens_it_and_pauses_grow_to_their_bound() -> None:
    breaker, now_s, pauses = TierBreaker(), 0.0, []
    breaker.failed(now_s, late=True)
    for _ in range(8):
        began_s = now_s
        while not breaker.admits(now_s):
            now_s += 0.25
        pauses.append(now_s - began_s)
        breaker.failed(now_s, late=True)
    assert pauses[0] == TIER_PAUSE_MIN_S
    assert pauses == sorted(pauses)
    assert pauses[-1] == TIER_PAUSE_MAX_S


@given(st.lists(st.sampled_from(["late", "error", "fine", "wait"]), max_size=60))
def test_it_never_stays_open_for_good(events: list[str]) -> None:
    breaker, now_s = TierBreaker(), 0.0
    for event in events:
        if event == "wait":
            now_s += 1.0
        elif breaker.admits(now_s):
            if event == "fine":
                breaker.succeeded()
                assert breaker.would_admit(now_s)
            else:
                breaker.failed(now_s, late=event == "late")
    assert breaker.admits(now_s + TIER_PAUSE_MAX_S)


# ------------------------------------------------------------------------------------------ calls


def test_a_late_read_returns_and_its_memory_stays_lent(tier: HangingTier) -> None:
    counters = Counters()
    lower = LowerTiers([tier], LAYOUT, counters, deadline_s=0.01)
    into, over = torch.zeros(8, dtype=torch.uint8), threading.Event()
    read = lower.read(key(1), into)
    assert read.is_over, "it has not begun"
    assert read.found() is None and not read.is_over
    read.when_over(over.set)
    assert not over.is_set()
    assert lower.read(key(1), into).found() is None, "left alone"
    counted = counters.snapshot()
    assert (counted["tier_late_calls"], counted["tier_skipped_calls"], counted["failed_tier"]) == (1, 1, 1)
    tier.go.set()
    assert over.wait(DEADLINE_S)
    again = threading.Event()
    read.when_over(again.set)
    assert again.is_set() and read.is_over


def test_no_other_tier_writes_where_a_late_one_still_may(tier: HangingTier) -> None:
    other = MemoryTier(64, "other")
    other.put(key(1), torch.full((8,), 7, dtype=torch.uint8), LAYOUT)
    lower = LowerTiers([tier, other], LAYOUT, Counters(), deadline_s=0.01)
    into = torch.zeros(8, dtype=torch.uint8)
    assert lower.read(key(1), into).found() is None
    assert not into.any()
    found = lower.read(key(1), torch.zeros(8, dtype=torch.uint8)).found()
    assert found == Found(), "the other one, from now on"


def test_a_write_that_hangs_makes_the_tier_unavailable_until_it_returns(tier: HangingTier) -> None:
    now_s = 0.0
    calls = TierCalls(tier, Counters(), 1.0, clock=lambda: now_s)
    chunk = torch.zeros(8, dtype=torch.uint8)
    done: list[bool] = []
    writer = threading.Thread(
        target=lambda: done.append(calls.write(lambda: tier.put(key(1), chunk, LAYOUT)))
    )
    writer.start()
    assert tier.inside.acquire(timeout=DEADLINE_S)
    assert calls.is_available
    now_s = 1.5
    assert not calls.is_available
    tier.go.set()
    writer.join(DEADLINE_S)
    assert done == [True]
    assert not calls.is_available, "it was late"
    now_s = 10.0
    assert calls.write(lambda: True)
    assert calls.is_available


def test_threads_that_hang_do_not_grow_in_number(tier: HangingTier) -> None:
    before = threading.active_count()
    now_s = 0.0
    calls = TierCalls(tier, Counters(), 0.0, clock=lambda: now_s)
    for _ in range(50):
        now_s += 100.0
        calls.ask(lambda: tier.get(key(1), torch.zeros(8, dtype=torch.uint8), LAYOUT), None)
    assert threading.active_count() <= before + 4
    tier.go.set()
    calls.close()
    eventually(lambda: threading.active_count() <= before, "the threads end")


def test_what_is_asked_after_the_end_is_a_miss_at_once(tier: HangingTier) -> None:
    calls = TierCalls(tier, Counters(), DEADLINE_S)
    assert calls.ask(lambda: True, False)
    calls.close()
    assert calls.begin(lambda: True) is None
    assert not calls.ask(lambda: True, False)


def test_a_process_that_may_have_no_more_threads_misses_below(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    counters, tier = Counters(), MemoryTier(64)
    lower = LowerTiers([tier], LAYOUT, counters, deadline_s=DEADLINE_S)
    assert lower.put(key(1), torch.zeros(8, dtype=torch.uint8))
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        assert lower.contains([key(1)]) == [False]
        assert lower.read(key(1), torch.zeros(8, dtype=torch.uint8)).found() is None
        assert counters.snapshot()["tier_skipped_calls"] == 2
        lower.apart()[0].take_back(key(1))  # which must not be left out: it is done here and now
        assert len(tier) == 0
        assert lower.put(key(2), torch.zeros(8, dtype=torch.uint8))
    assert lower.contains([key(1), key(2)]) == [False, True]
    lower.close()


def test_what_a_tier_must_do_it_does_once_it_answers() -> None:
    class Down(MemoryTier):
        """Removes nothing while it is down."""

        is_down = True

        def remove(self, keys: Sequence[bytes]) -> int:
            if self.is_down:
                raise ConnectionResetError
            return super().remove(keys)

    tier = Down(64)
    lower = LowerTiers([tier], LAYOUT, Counters(), deadline_s=DEADLINE_S)
    assert lower.put(key(1), torch.zeros(8, dtype=torch.uint8))
    lower.apart()[0].take_back(key(1))
    assert lower.contains([key(1)]) == [True], "which makes the tier try again, in vain"
    tier.is_down = False
    eventually(lambda: lower.contains([key(1)]) == [False], "it is removed")
    lower.close()


def test_a_tier_that_is_only_written_is_tried_again_after_its_pause(tier: HangingTier) -> None:
    now_s = 0.0
    calls = TierCalls(tier, Counters(), 1.0, clock=lambda: now_s)

    def late() -> bool:
        nonlocal now_s
        now_s += 2.0
        return True

    assert calls.write(late)
    assert not calls.is_available
    now_s += TIER_PAUSE_MIN_S
    assert calls.is_available, "nobody but its writer asks it"
    assert calls.write(lambda: True)
    now_s = 0.0
    assert calls.is_available


class Refusing(MemoryTier):
    """Raises what no one expects."""

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        raise SystemError("native")


def test_whatever_a_tier_raises_stays_inside() -> None:
    counters = Counters()
    lower = LowerTiers([Refusing(64)], LAYOUT, counters)
    assert [lower.contains([key(1)]) for _ in range(5)] == [[False]] * 5
    assert counters.snapshot()["failed_tier"] == TIER_FAILURES_MAX


def test_remove_and_clear_reach_all_tiers() -> None:
    tiers = [MemoryTier(64, "one"), MemoryTier(64, "two")]
    lower = LowerTiers(tiers, LAYOUT, Counters())
    for number in (1, 2):
        assert lower.put(key(number), torch.zeros(8, dtype=torch.uint8))
    assert lower.remove([key(1)]) == 2
    assert lower.contains([key(1), key(2)]) == [False, True]
    lower.clear()
    assert [len(tier) for tier in tiers] == [0, 0]


def test_the_time_that_is_left() -> None:
    assert ttl_left_ms(Found()) == -1
    assert ttl_left_ms(Found(5_000), lambda: 2.0) == 3_000
    assert ttl_left_ms(Found(5_000), lambda: 9.0) == 1
    assert ttl_left_ms(Found(1 << 62), lambda: 0.0) == TTL_MS_MAX


def test_memory_forgets_what_has_expired() -> None:
    now_s = 1.0
    tier = MemoryTier(64, clock=lambda: now_s)
    chunk, into = torch.ones(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    assert tier.put(key(1), chunk, LAYOUT, 2_000)
    assert tier.get(key(1), into, LAYOUT) == Found(2_000)
    now_s = 2.0
    assert tier.contains([key(1)]) == [False]
    assert tier.get(key(1), into, LAYOUT) is None
    assert tier.put(key(1), chunk, LAYOUT, 3_000)
    assert (tier.contains([key(1)]), tier.held_bytes) == ([True], 8)
