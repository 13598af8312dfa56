"""Lower tiers: where chunks live that the pool cannot hold.

`Tier` is what the engine asks of one; `MemoryTier` is the one that lives in this process.
"""

from __future__ import annotations

from vcache.tiers.base import Tier
from vcache.tiers.memory import MemoryTier

__all__ = ["MemoryTier", "Tier"]
