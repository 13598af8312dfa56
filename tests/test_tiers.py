"""The tier in memory, and what the engine makes of tiers that fail."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from vcache.engine.lower import LowerTiers
from vcache.engine.stats import Cause, Counters
from vcache.errors import ArgumentError, EngineClosed
from vcache.tiers import Found, MemoryTier, Tier

LAYOUT, OTHER = b"L" * 16, b"O" * 16


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def chunk(value: int, size: int = 8) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


def read(tier: Tier | LowerTiers, number: int, size: int = 8) -> list[int] | None:
    into = torch.zeros(size, dtype=torch.uint8)
    if isinstance(tier, LowerTiers):
        found = tier.read(key(number), into).found()
    else:
        found = tier.get(key(number), into, LAYOUT)
    return into.tolist() if found else None


def test_memory_is_a_tier() -> None:
    assert isinstance(MemoryTier(1), Tier)
    assert not isinstance(object(), Tier)


def test_what_was_put_is_read_and_a_later_change_of_the_source_does_not_count() -> None:
    tier, source = MemoryTier(64), chunk(7)
    tier.put(key(1), source, LAYOUT)
    source.fill_(9)
    assert tier.contains([key(1), key(2)]) == [True, False]
    assert read(tier, 1) == [7] * 8
    assert read(tier, 2) is None


def test_another_layout_or_length_is_a_miss() -> None:
    tier = MemoryTier(64)
    tier.put(key(1), chunk(7), OTHER)
    assert read(tier, 1) is None
    tier.put(key(2), chunk(7), LAYOUT)
    assert read(tier, 2, size=4) is None
    assert read(tier, 2) == [7] * 8


def test_a_key_that_is_there_keeps_what_it_has() -> None:
    tier = MemoryTier(64)
    tier.put(key(1), chunk(7), LAYOUT)
    tier.put(key(1), chunk(8), LAYOUT)
    assert read(tier, 1) == [7] * 8
    assert tier.held_bytes == 8


def test_the_least_recently_used_goes_first() -> None:
    tier = MemoryTier(24)
    for number in (1, 2, 3):
        tier.put(key(number), chunk(number), LAYOUT)
    assert read(tier, 1) == [1] * 8
    tier.put(key(4), chunk(4, 16), LAYOUT)
    assert tier.contains([key(number) for number in (1, 2, 3, 4)]) == [True, False, False, True]
    assert tier.held_bytes == 24


def test_a_chunk_larger_than_the_tier_is_not_kept_and_evicts_nothing() -> None:
    tier = MemoryTier(8)
    tier.put(key(1), chunk(1), LAYOUT)
    tier.put(key(2), chunk(2, 9), LAYOUT)
    assert tier.contains([key(1), key(2)]) == [True, False]


def test_remove_and_clear_forget() -> None:
    tier = MemoryTier(64)
    for number in (1, 2, 3):
        tier.put(key(number), chunk(number), LAYOUT)
    assert tier.remove([key(1), key(9)]) == 1
    assert (len(tier), tier.held_bytes) == (2, 16)
    tier.clear()
    assert (len(tier), tier.held_bytes) == (0, 0)


def test_a_closed_tier_takes_nothing() -> None:
    tier = MemoryTier(64)
    tier.put(key(1), chunk(1), LAYOUT)
    tier.close()
    tier.close()
    assert read(tier, 1) is None
    with pytest.raises(EngineClosed, match="memory"):
        tier.put(key(2), chunk(2), LAYOUT)


def test_a_negative_capacity_is_refused() -> None:
    with pytest.raises(ArgumentError, match="capacity_bytes: got -1"):
        MemoryTier(-1)


class BrokenTier:
    """A tier of which everything fails."""

    name = "broken"

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        raise OSError("disk gone")

    def get(self, key: bytes, into: torch.Tensor, layout: bytes) -> Found | None:
        raise OSError("disk gone")

    def put(self, key: bytes, chunk: torch.Tensor, layout: bytes, expires_ms: int = 0) -> bool:
        raise OSError("disk gone")

    def remove(self, keys: Sequence[bytes]) -> int:
        raise OSError("disk gone")

    def clear(self) -> None:
        raise OSError("disk gone")

    def close(self) -> None:
        raise OSError("disk gone")


def test_the_first_tier_that_has_a_chunk_gives_it_and_all_get_a_copy() -> None:
    fast, slow, counters = MemoryTier(8, "fast"), MemoryTier(64, "slow"), Counters()
    lower = LowerTiers([fast, slow], LAYOUT, counters)
    lower.put(key(1), chunk(1))
    lower.put(key(2), chunk(2))
    assert lower.contains([key(1), key(2), key(3)]) == [True, True, False]
    assert fast.contains([key(1), key(2)]) == [False, True]
    assert read(lower, 1) == [1] * 8
    assert read(lower, 3) is None
    assert counters.snapshot()[Cause.TIER.value] == 0


def test_a_tier_that_fails_is_a_miss_and_counted() -> None:
    slow, counters = MemoryTier(64), Counters()
    lower = LowerTiers([BrokenTier(), slow], LAYOUT, counters)
    lower.put(key(1), chunk(1))
    assert lower.contains([key(1)]) == [True]
    assert read(lower, 1) == [1] * 8
    assert counters.snapshot()[Cause.TIER.value] == 3


def test_without_tiers_nothing_is_below() -> None:
    lower = LowerTiers([], LAYOUT, Counters())
    assert not lower
    assert lower.contains([key(1)]) == [False]
    assert read(lower, 1) is None
