"""Lower tiers: where chunks live that the pool cannot hold.

`Tier` is what the engine asks of one; `MemoryTier` lives in this process, `vcache.tiers.rocksdb` on a local
SSD, `vcache.tiers.mooncake` on other machines. Imported on first use: the process that owns a database needs
no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vcache.tiers.base import Found, Tier
    from vcache.tiers.memory import MemoryTier

__all__ = ["Found", "MemoryTier", "Tier"]

_HOME = {"Found": "base", "MemoryTier": "memory", "Tier": "base"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vcache.tiers' has no attribute {name!r}")
    return getattr(import_module(f"vcache.tiers.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
