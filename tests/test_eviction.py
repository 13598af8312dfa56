"""Eviction policies: small scenarios, LRU against a plain list, what S3-FIFO keeps whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from metadata_server.eviction import S3FIFO, EvictionPolicy, make_policy
from vcache.errors import ArgumentError

POLICIES = ("lru", "s3fifo")
EXTENTS = st.integers(0, 11)


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "little")


def nothing(extent: int) -> bool:
    return False


def filled(name: str, count: int) -> EvictionPolicy:
    """A policy with extents 0 to count - 1, inserted in that order, extent n under key n."""
    policy = make_policy(name)  # type: ignore[arg-type]
    for extent in range(count):
        policy.insert(extent, key_of(extent))
    return policy


def evict_one(policy: EvictionPolicy) -> int:
    (extent,) = policy.evict(1, nothing)
    return extent


# --- every policy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_untouched_extents_leave_in_the_order_they_came(name: str) -> None:
    policy = filled(name, 4)

    assert policy.coldest() == 0
    assert policy.evict(3, nothing) == [0, 1, 2]
    assert len(policy) == 1


@pytest.mark.parametrize("name", POLICIES)
def test_peek_names_what_is_evicted_next_and_changes_nothing(name: str) -> None:
    policy = filled(name, 6)
    policy.touch([0])

    assert policy.peek(2, {1}.__contains__) == [2, 3]
    assert policy.peek(0, nothing) == policy.peek(-1, nothing) == []
    policy.give_up([2])
    assert policy.evict(2, nothing) == [1, 3]


@pytest.mark.parametrize("name", POLICIES)
def test_evict_returns_what_there_is_when_asked_for_more(name: str) -> None:
    policy = filled(name, 3)
    policy.touch([0, 1, 2, 0, 1, 2, 0, 1, 2])

    assert sorted(policy.evict(10, nothing)) == [0, 1, 2]
    assert policy.evict(10, nothing) == []
    assert policy.coldest() is None


@pytest.mark.parametrize("name", POLICIES)
def test_evict_of_nothing_changes_nothing(name: str) -> None:
    policy = filled(name, 3)

    assert policy.evict(0, nothing) == []
    assert policy.evict(-1, nothing) == []
    assert len(policy) == 3


@pytest.mark.parametrize("name", POLICIES)
def test_evict_ends_when_all_are_protected(name: str) -> None:
    policy = filled(name, 4)
    policy.touch([1, 2, 1, 2])

    assert policy.evict(4, lambda extent: True) == []
    assert len(policy) == 4


@pytest.mark.parametrize("name", POLICIES)
def test_protected_extents_keep_their_place(name: str) -> None:
    policy = filled(name, 5)

    assert policy.evict(1, {0, 1}.__contains__) == [2]
    assert policy.coldest() == 0
    assert policy.evict(4, nothing) == [0, 1, 3, 4]


@pytest.mark.parametrize("name", POLICIES)
def test_a_removed_extent_is_forgotten_and_may_come_back(name: str) -> None:
    policy = filled(name, 3)
    policy.touch([0])
    policy.remove(0)
    policy.remove(0)

    assert len(policy) == 2
    policy.insert(0, key_of(7))
    assert policy.evict(3, nothing) == [1, 2, 0]


@pytest.mark.parametrize("name", POLICIES)
def test_touching_or_removing_a_stranger_is_ignored(name: str) -> None:
    policy = filled(name, 2)
    policy.touch([5, 0, 999_999])
    policy.remove(7)

    assert evict_one(policy) == 1
    assert evict_one(policy) == 0


@pytest.mark.parametrize("name", POLICIES)
def test_inserting_twice_is_a_mistake_of_ours(name: str) -> None:
    policy = filled(name, 2)

    with pytest.raises(AssertionError):
        policy.insert(1, key_of(1))


def test_an_unknown_policy_is_named_with_those_there_are() -> None:
    with pytest.raises(ArgumentError, match="eviction policy: got 'lfu', wanted 'lru' or 's3fifo'"):
        make_policy("lfu")  # type: ignore[arg-type]


# --- LRU ----------------------------------------------------------------------------------------------------


def test_lru_last_touched_is_the_most_recent() -> None:
    policy = filled("lru", 4)
    policy.touch([1, 0])

    assert policy.evict(4, nothing) == [2, 3, 1, 0]


def test_lru_prefix_touched_tail_first_loses_its_tail_first() -> None:
    policy = filled("lru", 4)
    prefix = [0, 1, 2, 3]
    policy.touch(prefix[::-1])

    assert policy.evict(2, nothing) == [3, 2]


class LRUAgainstList(RuleBasedStateMachine):
    """`LRU` does what a list of extents, coldest first, does."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = make_policy("lru")
        self.order: list[int] = []

    @rule(extent=EXTENTS)
    def insert(self, extent: int) -> None:
        if extent not in self.order:
            self.policy.insert(extent, key_of(extent))
            self.order.append(extent)

    @rule(extents=st.lists(EXTENTS, max_size=4))
    def touch(self, extents: list[int]) -> None:
        self.policy.touch(extents)
        for extent in extents:
            if extent in self.order:
                self.order.remove(extent)
                self.order.append(extent)

    @rule(extent=EXTENTS)
    def remove(self, extent: int) -> None:
        self.policy.remove(extent)
        self.order = [other for other in self.order if other != extent]

    @rule(count=st.integers(0, 6), protected=st.sets(EXTENTS))
    def evict(self, count: int, protected: set[int]) -> None:
        wanted = [extent for extent in self.order if extent not in protected][:count]
        assert self.policy.peek(count, protected.__contains__) == wanted
        assert self.policy.evict(count, protected.__contains__) == wanted
        self.order = [extent for extent in self.order if extent not in wanted]

    @rule(count=st.integers(0, 6))
    def give_up(self, count: int) -> None:
        self.policy.give_up(self.order[1 : 1 + count])
        del self.order[1 : 1 + count]

    @invariant()
    def agrees(self) -> None:
        assert len(self.policy) == len(self.order)
        assert self.policy.coldest() == (self.order[0] if self.order else None)


# --- S3-FIFO ------------------------------------------------------------------------------------------------


def use_and_replace(policy: EvictionPolicy, extents: Collection[int]) -> None:
    """Touch these, then replace as many extents as there are by chunks that are not used again."""
    policy.touch(list(extents))
    for number in range(len(policy)):
        policy.insert(evict_one(policy), key_of(1_000 + number))


def test_s3fifo_chunks_used_once_do_not_displace_those_used_again() -> None:
    policy = filled("s3fifo", 20)
    use_and_replace(policy, [3, 4])

    for number in range(100):
        extent = evict_one(policy)
        assert extent not in (3, 4)
        policy.insert(extent, key_of(2_000 + number))


def test_s3fifo_a_chunk_that_comes_back_outlives_one_that_is_new() -> None:
    policy = filled("s3fifo", 20)
    came_back = evict_one(policy)
    policy.insert(came_back, key_of(0))  # the chunk is what is recognised, in whatever extent
    new = evict_one(policy)
    policy.insert(new, key_of(99))

    assert policy.evict(19, nothing)[-1] == new
    assert policy.evict(1, nothing) == [came_back]


def test_s3fifo_forgets_what_left_longer_ago_than_the_pool_is_large() -> None:
    policy = filled("s3fifo", 10)
    for number in range(10, 30):
        policy.insert(evict_one(policy), key_of(number))
    came_back_late = evict_one(policy)
    policy.insert(came_back_late, key_of(0))
    new = evict_one(policy)
    policy.insert(new, key_of(99))

    assert policy.evict(10, nothing)[-2:] == [came_back_late, new]


def test_s3fifo_each_touch_saves_a_main_extent_once() -> None:
    policy = filled("s3fifo", 3)
    policy.touch([0, 1, 2])
    assert policy.evict(3, {0, 1, 2}.__contains__) == []
    assert policy.evict(1, nothing) == [0]  # all move on, and the first is given up
    policy.touch([1, 1])

    assert policy.evict(2, nothing) == [2, 1]


def test_s3fifo_the_main_queue_gives_up_once_the_small_one_is_below_its_share() -> None:
    policy = filled("s3fifo", 20)
    policy.touch(range(20))

    assert evict_one(policy) == 0  # 0 to 18 moved on, 19 is below the share of 2
    policy.insert(0, key_of(100))
    assert evict_one(policy) == 1  # 19 moved on too
    policy.insert(1, key_of(101))
    assert evict_one(policy) == 0  # 0 and 1 are the share, and untouched


@pytest.mark.parametrize("size", [1, 7, 64])
def test_s3fifo_one_large_eviction_chooses_what_small_ones_would(size: int) -> None:
    """A batch that is no larger than the small queue's share is chosen like the same number one by one."""
    at_once, one_by_one = filled("s3fifo", 1_000), filled("s3fifo", 1_000)
    for policy in (at_once, one_by_one):
        use_and_replace(policy, range(0, 1_000, 3))
    batch = at_once.evict(size, nothing)
    chosen = []
    for number in range(size):
        extent = evict_one(one_by_one)
        chosen.append(extent)
        one_by_one.insert(extent, key_of(9_000 + number))

    assert batch == chosen


def test_s3fifo_remembers_no_more_than_twice_the_pool() -> None:
    policy = S3FIFO()
    for number in range(50):
        policy.insert(number, key_of(number))
    for number in range(50, 5_000):
        policy.insert(evict_one(policy), key_of(number % 60))  # most of them return while remembered

    assert len(policy) == 50
    assert len(policy._ghost._members) <= 50
    assert len(policy._ghost._order) <= 100


class S3FIFOKeepsItsExtents(RuleBasedStateMachine):
    """`S3FIFO` loses and doubles none, spares the protected, and gives up exactly as many as it can."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = make_policy("s3fifo")
        self.inside: set[int] = set()

    @initialize(count=st.integers(0, 12))
    def fill(self, count: int) -> None:
        self.policy = filled("s3fifo", count)
        self.inside = set(range(count))

    @rule(extent=EXTENTS, number=st.integers(0, 15))
    def insert(self, extent: int, number: int) -> None:
        if extent not in self.inside:
            self.policy.insert(extent, key_of(number))
            self.inside.add(extent)

    @rule(extents=st.lists(EXTENTS, max_size=8))
    def touch(self, extents: list[int]) -> None:
        self.policy.touch(extents)

    @rule(extent=EXTENTS)
    def remove(self, extent: int) -> None:
        self.policy.remove(extent)
        self.inside.discard(extent)

    @rule(count=st.integers(0, 6), protected=st.sets(EXTENTS))
    def evict(self, count: int, protected: set[int]) -> None:
        looked_at: list[int] = []
        coldest = self.policy.coldest()
        chosen = self.policy.evict(count, noting(looked_at, protected))

        assert len(chosen) == len(set(chosen)) == min(count, len(self.inside - protected))
        assert set(chosen) <= self.inside - protected
        assert not count or looked_at[:1] == ([] if coldest is None else [coldest])
        self.inside -= set(chosen)

    @rule(count=st.integers(0, 6), protected=st.sets(EXTENTS), gives_up=st.booleans())
    def peek(self, count: int, protected: set[int], gives_up: bool) -> None:
        named = self.policy.peek(count, protected.__contains__)
        assert len(named) == len(set(named)) == min(count, len(self.inside - protected))
        assert set(named) <= self.inside - protected
        assert self.policy.peek(count, protected.__contains__) == named
        if gives_up:
            self.policy.give_up(named)
            self.inside -= set(named)

    @invariant()
    def holds_what_came_and_did_not_leave(self) -> None:
        assert len(self.policy) == len(self.inside)
        assert (self.policy.coldest() in self.inside) == bool(self.inside)

    def teardown(self) -> None:
        assert sorted(self.policy.evict(100, nothing)) == sorted(self.inside)


def noting(looked_at: list[int], protected: Collection[int]) -> Callable[[int], bool]:
    def is_protected(extent: int) -> bool:
        looked_at.append(extent)
        return extent in protected

    return is_protected


TestLRUAgainstList = LRUAgainstList.TestCase
TestS3FIFOKeepsItsExtents = S3FIFOKeepsItsExtents.TestCase
TestLRUAgainstList.settings = TestS3FIFOKeepsItsExtents.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
