"""The parts of the LMCache integration that need no LMCache; with real LMCache: `make test-lmcache`."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from integration.lmcache.core import Core
from integration.lmcache.misses import Failures, nones, otherwise
from integration.lmcache.settings import read
from vcache.errors import ConfigError, SegmentError
from vcache.layout import KVLayout
from vcache.tiers import MemoryTier, Tier

MADE: list[_Tier] = []
"""By the test that runs."""


@pytest.fixture(autouse=True)
def _none_made() -> None:
    MADE.clear()


class _Tier(MemoryTier):
    """One that knows whether it was closed."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.closed = False
        MADE.append(self)

    def close(self) -> None:
        self.closed = True
        super().close()


class _Unnamed(_Tier):
    """One that fails when it is used: once another was made after it, all that is left is using them."""

    @property
    def name(self) -> str:
        if MADE[-1] is not self:
            raise ZeroDivisionError
        return "unnamed"


def fails() -> Tier:
    """A factory of tiers, as somebody else might write one."""
    raise RuntimeError("no disk there")


def says_nothing() -> Tier:
    """One whose error has no words."""
    raise KeyError


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fails", "RuntimeError: no disk there"),
        ("says_nothing", "KeyError: "),
        ("nowhere", "AttributeError: "),
        ("MADE", "TypeError: "),
    ],
)
def test_a_factory_that_fails_is_named_with_its_field(name: str, said: str) -> None:
    factory = f"{__name__}:{name}"
    with pytest.raises(ConfigError) as caught:
        read({"vcache.tiers": [factory]})
    assert str(caught.value).startswith(f"vcache.tiers: {factory!r} makes no tier: {said}")


def test_tiers_made_before_one_that_fails_are_closed() -> None:
    with pytest.raises(ConfigError, match="no disk there"):
        read({"vcache.tiers": [f"{__name__}:_Tier", f"{__name__}:fails"]})
    assert [tier.closed for tier in MADE] == [True]


@pytest.mark.parametrize("given", [["vcache.segment.size"], "vcache.segment.size: 0", 5])
def test_settings_that_are_no_mapping_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read(given)
    assert str(caught.value) == f"extra_config: got {given!r}, wanted a mapping of settings by name"


LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_size=8, dtype="float32", chunk_tokens=4)


@pytest.mark.parametrize(
    ("given", "device", "raised"),
    [
        ({}, "no device", RuntimeError),  # from torch
        ({"vcache.segment.size": "512TiB"}, "cpu", SegmentError),
        ({"vcache.runtime_dir": "/proc/nowhere"}, "cpu", ConfigError),  # the client's
        ({"vcache.tiers": [f"{__name__}:_Unnamed", f"{__name__}:_Tier"]}, "cpu", ZeroDivisionError),
    ],
)
def test_a_core_that_cannot_be_made_leaves_nothing(
    runtime_dir: Path, given: dict[str, Any], device: str, raised: type[Exception]
) -> None:
    before = set(threading.enumerate())
    given = {
        "vcache.runtime_dir": str(runtime_dir),
        "vcache.server.autostart": False,
        "vcache.segment.size": 0,
        "vcache.tiers": [f"{__name__}:_Tier"],
        **given,
    }
    with pytest.raises(raised):
        Core(given, layout=LAYOUT, model="m", name="test", device=device)
    assert MADE and all(tier.closed for tier in MADE)
    assert set(threading.enumerate()) <= before


class _Failing:
    failures = Failures()

    @otherwise(nones)
    def each(self, keys: list[int], pin: bool = False) -> list[int]:
        raise RuntimeError

    @otherwise(nones)
    async def each_later(self, keys: list[int], pin: bool = False) -> list[int]:
        raise RuntimeError

    @otherwise(nones)
    def nothing(self) -> list[int]:
        raise RuntimeError


def test_a_miss_for_each_key_however_the_keys_were_passed() -> None:
    failing = _Failing()
    assert failing.each([1, 2]) == failing.each(keys=[1, 2]) == failing.each(pin=True, keys=[1, 2])
    assert failing.each(keys=[1, 2]) == [None, None]
    assert asyncio.run(failing.each_later(keys=[1, 2])) == [None, None]
    assert failing.nothing() == []
