"""VCache as an L2 adapter of `lmcache server`:

{"type": "plugin", "module_path": "integration.lmcache_l2_adapter", "class_name": "VCacheL2Adapter",
 "adapter_params": {"vcache.segment.size": "8GiB"}}
"""

from __future__ import annotations

from integration.lmcache.l2_adapter import VCacheL2Adapter

__all__ = ["VCacheL2Adapter"]
