"""Found by LMCache's health monitor: whether our metadata server answers."""

from __future__ import annotations

from typing import Any

from lmcache.v1.health_monitor.base import HealthCheck
from lmcache.v1.health_monitor.constants import FallbackPolicy

from integration.lmcache.backend import VCacheStorageBackend


class VCacheHealthCheck(HealthCheck):
    """Unhealthy while there is no server: LMCache then passes this backend over, not the others."""

    def __init__(self, backend_name: str, backend: VCacheStorageBackend) -> None:
        self._backend_name = backend_name
        self._backend = backend

    @classmethod
    def create(cls, manager: Any) -> list[Any]:
        """One for each backend of ours that this LMCache has."""
        storage = getattr(manager.lmcache_engine, "storage_manager", None)
        backends = {} if storage is None else storage.storage_backends
        return [
            cls(name, backend)
            for name, backend in backends.items()
            if isinstance(backend, VCacheStorageBackend)
        ]

    def name(self) -> str:
        """For LMCache's log."""
        return f"VCacheHealthCheck({self._backend_name})"

    def check(self) -> bool:
        """Whether the metadata server answers; asks nobody, for the session knows."""
        return self._backend.healthy

    @property
    def fallback_policy(self) -> FallbackPolicy:
        """To pass our backend over, not to stop caching."""
        return FallbackPolicy.LOCAL_CPU

    def get_bypass_backend_name(self) -> str:
        """Under which LMCache knows our backend."""
        return self._backend_name
