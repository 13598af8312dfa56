"""What LMCache's configuration says about VCache: `extra_config`, keys that begin with "vcache."

vcache.config: /etc/vcache.yaml       a file of ours
vcache.segment.size: 5GiB             any field of `vcache.config`, as in such a file
vcache.tiers.order: rocksdb           lower tiers, as in such a file
vcache.tiers: ["module:function"]     or tiers of one's own, the fastest first: each function makes one
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
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
    if given is not None and not isinstance(given, Mapping):  # LMCache takes what the YAML has there
        raise ConfigError(f"extra_config: got {given!r}, wanted a mapping of settings by name")
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
    return Settings(config, tuple(make_tiers(config) if tiers is None else _made(tiers)))


def _made(factories: Sequence[object]) -> list[Tier]:
    """What the factories make. Raises ConfigError if one fails; what the others made is closed then."""
    with ExitStack() as undo:
        tiers = []
        for name in factories:
            tiers.append(_made_by(name))
            undo.callback(tiers[-1].close)
        undo.pop_all()
    return tiers


def _made_by(name: object) -> Tier:
    module, _, function = str(name).partition(":")
    try:
        tier = getattr(importlib.import_module(module), function)()
    except Exception as error:  # it is somebody else's code: it may raise whatever it likes
        raise ConfigError(f"vcache.tiers: {name!r} makes no tier: {type(error).__name__}: {error}") from error
    if not isinstance(tier, Tier):
        raise ConfigError(f"vcache.tiers: {name!r} made a {type(tier).__name__}, wanted a Tier")
    return tier
