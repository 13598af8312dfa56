"""The tiers that a configuration names, made in their order."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vcache.config import Config
from vcache.errors import ConfigError

if TYPE_CHECKING:
    from vcache.tiers.base import Tier
    from vcache.tiers.mooncake.tier import MooncakeTier
    from vcache.tiers.rocksdb.tier import RocksTier


def tier_names(config: Config) -> list[str]:
    """The names of the configured tiers, in order."""
    return [name.strip() for name in (config.tiers.order or "").split(",") if name.strip()]


def make_tiers(config: Config, *, observes: bool = False) -> list[Tier]:
    """Make them; whoever calls closes them. Raises ConfigError: what is missing, what is wrong.

    observes: for people who look: nothing is lent, and no setting of engines is touched.
    """
    made: list[Tier] = []
    try:
        for name in tier_names(config):
            if name == "rocksdb":
                made.append(rocks_tier(config, observes=observes))
            else:
                made.append(mooncake_tier(config, observes=observes))
    except BaseException:
        for tier in made:
            tier.close()
        raise
    return made


def rocks_tier(config: Config, *, observes: bool = False) -> RocksTier:
    """The tier on the local SSD. observes: as of `RocksTier`; else its owner goes by this configuration from
    now on.
    """
    _require("rocksdb", "rocksdict", "xxhash", extra="rocksdb")
    from vcache.tiers.rocksdb.tier import RocksTier

    settings = config.tiers.rocksdb
    return RocksTier(
        settings.directory or default_directory(),
        capacity_bytes=settings.size,
        ttl_s=settings.ttl_s,
        deadline_s=config.tiers.deadline_ms / 1e3,
        observes=observes,
    )


def mooncake_tier(config: Config, *, observes: bool = False) -> MooncakeTier:
    """The tier on other machines. observes: without lending memory or a disk to it."""
    _require("mooncake", "mooncake.store", "xxhash", extra="mooncake")
    from vcache.tiers.mooncake.tier import MooncakeTier

    settings = config.tiers.mooncake
    if observes:
        settings = msgspec.structs.replace(settings, lend=0, offload_directory=None)
    return MooncakeTier(settings)


def default_directory() -> Path:
    """Where the local tier lies if nobody says it."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache and os.path.isabs(cache) else Path.home() / ".cache") / "vcache"


def _require(tier: str, *modules: str, extra: str) -> None:
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"tiers.order: {tier!r} needs {module.partition('.')[0]}, which is not to be had ({error}); "
                f"install it: pip install -e '.[{extra}]' in VCache's clone (docs/tiers.md says which wheel "
                "and packages)"
            ) from error
