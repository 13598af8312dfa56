"""The engine: chunks of KV between an inference engine's paged KV cache and the pool."""

from __future__ import annotations

from vcache.engine.engine import VCacheEngine
from vcache.engine.handles import Handle, StoreHandle
from vcache.engine.layerwise import RetrieveHandle
from vcache.engine.lookup import Location

__all__ = ["Handle", "Location", "RetrieveHandle", "StoreHandle", "VCacheEngine"]
