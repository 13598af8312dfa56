"""What LMCache's configuration says about VCache: `extra_config`, keys that begin with "vcache."

vcache.config: /etc/vcache.yaml       a file of ours
vcache.segment.size: 5GiB             any field of `vcache.config`, as in such a file
vcache.tiers.order: rocksdb           lower tiers, as in such a file
vcache.tiers: ["module:function"]     or tiers of one's own, the fastest first: each function makes one
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vcache.config import Config, load
from vcache.errors import ConfigError
from vcache.tiers import Tier
from vcache.tiers.configured import make_tiers

_PREFIX = "vcache."


class Settings(NamedTuple):
    """A checked configuration and the lower tiers that it names."""

    config: Config
    tiers: tuple[Tier, ...]


def read(given: Mapping[str, Any] | None, **overrides: Any) -> Settings:
    """Read the keys that are ours from `given`. Raises ConfigError with field, value and what is wanted."""
    ours = {
        str(name).removeprefix(_PREFIX): value
        for name, value in (given or {}).items()
        if str(name).startswith(_PREFIX)
    }
    path = ours.pop("config", None)
    tiers = ours.pop("tiers", None)
    if path is not None and not isinstance(path, str):
        raise ConfigError(f"vcache.config: got {path!r}, wanted the path of a YAML file")
    if tiers is not None and (isinstance(tiers, str) or not isinstance(tiers, Sequence)):
        raise ConfigError(f"vcache.tiers: got {tiers!r}, wanted a list of 'module:function'")
    config = load(path, **{**ours, **overrides}).config
    if tiers is None:
        return Settings(config, tuple(make_tiers(config)))
    return Settings(config, tuple(_made(name) for name in tiers))


def _made(name: object) -> Tier:
    module, _, function = str(name).partition(":")
    try:
        tier = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"vcache.tiers: {name!r} makes no tier: {error}") from error
    if not isinstance(tier, Tier):
        raise ConfigError(f"vcache.tiers: {name!r} made a {type(tier).__name__}, wanted a Tier")
    return tier
