"""The engine: chunks of KV between an inference engine's paged KV cache and the pool."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # lazily: a holder needs parts of this and no torch
    from vcache.engine.engine import VCacheEngine
    from vcache.engine.handles import Handle, StoreHandle
    from vcache.engine.layerwise import RetrieveHandle
    from vcache.engine.lookup import Location

__all__ = ["Handle", "Location", "RetrieveHandle", "StoreHandle", "VCacheEngine"]

_HOME = {
    "Handle": "handles",
    "Location": "lookup",
    "RetrieveHandle": "layerwise",
    "StoreHandle": "handles",
    "VCacheEngine": "engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vcache.engine' has no attribute {name!r}")
    return getattr(import_module(f"vcache.engine.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
