"""VCache as an entry of LMCache's `storage_plugins`:

    extra_config:
      storage_plugin.LocalCPUBackend.module_path: integration.lmcache_plugin
      storage_plugin.LocalCPUBackend.class_name: VCacheStorageBackend

The three positions, and which to choose: docs/lmcache.md.
"""

from __future__ import annotations

from integration.lmcache.backend import VCacheStorageBackend

__all__ = ["VCacheStorageBackend"]
