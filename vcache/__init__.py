"""VCache: a node's GPU memory as one pool of KV cache.

Names are imported on first use, so that what needs no torch (the server, the command line's help) never loads
it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vcache.config import Config
    from vcache.engine import Location, VCacheEngine
    from vcache.errors import VCacheError
    from vcache.layout import KVLayout

__version__ = "0.1.0"
__all__ = ["Config", "KVLayout", "Location", "VCacheEngine", "VCacheError", "__version__"]

_HOME = {
    "Config": "vcache.config",
    "KVLayout": "vcache.layout",
    "Location": "vcache.engine",
    "VCacheEngine": "vcache.engine",
    "VCacheError": "vcache.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vcache' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
