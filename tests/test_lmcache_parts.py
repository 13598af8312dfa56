"""The parts of the LMCache integration that need no LMCache; with real LMCache: `make test-lmcache`."""

from __future__ import annotations

from typing import Any

import pytest

from integration.lmcache.settings import read
from vcache.errors import ConfigError
from vcache.tiers import MemoryTier, Tier

MADE: list[_Tier] = []


class _Tier(MemoryTier):
    """One that knows whether it was closed."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.closed = False
        MADE.append(self)

    def close(self) -> None:
        self.closed = True
        super().close()


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
    assert MADE.pop().closed


@pytest.mark.parametrize("given", [["vcache.segment.size"], "vcache.segment.size: 0", 5])
def test_settings_that_are_no_mapping_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read(given)
    assert str(caught.value) == f"extra_config: got {given!r}, wanted a mapping of settings by name"
