"""Where in LMCache's chain of backends the plugin is: found out from the configuration."""

from __future__ import annotations

from enum import Enum
from typing import Any


class Position(Enum):
    """What the plugin is to LMCache; the value is for logs."""

    PRIMARY = "primary"
    """Its allocator: chunks are written into the pool and read out of it, in place."""
    BESIDE = "beside"
    """Beside a CPU backend without a hot cache: a copy on store, none on retrieve."""
    STAGED = "staged"
    """Behind the CPU backend's hot cache, which must hold only memory of its own: a copy each way."""
    QUERY = "query"
    """In vLLM's scheduler: answers lookups, moves nothing."""


_FASTEST = "max_local_cpu_size: 0 with the plugin named LocalCPUBackend (docs/lmcache.md)"

HINTS = {
    Position.STAGED: "every chunk is copied once more, each way, through LMCache's CPU memory; "
    f"faster: local_cpu: false, and fastest: {_FASTEST}",
    Position.BESIDE: f"a stored chunk is copied once through LMCache's CPU memory; faster: {_FASTEST}",
}


def position_of(config: Any, metadata: Any, local_cpu_backend: Any) -> Position:
    """The position that LMCache's configuration, metadata and own CPU backend make."""
    if getattr(metadata, "role", None) == "scheduler":
        return Position.QUERY
    if local_cpu_backend is None:
        return Position.PRIMARY
    return Position.STAGED if config.local_cpu else Position.BESIDE


def primary_mistake(config: Any) -> str:
    """What is wrong with a configuration without a CPU backend; empty if nothing is."""
    if "LocalCPUBackend" in (config.storage_plugins or ()):
        return ""
    return (
        f"storage_plugins: got {list(config.storage_plugins or ())} with max_local_cpu_size: "
        f"{config.max_local_cpu_size}, wanted [LocalCPUBackend]: LMCache takes the backend of that name as "
        "its allocator (or give it CPU memory of its own with max_local_cpu_size)"
    )
