"""Our figures among LMCache's: gauges in the registry that its metrics endpoint shows."""

from __future__ import annotations

import weakref
from typing import Any

from integration.lmcache.core import Core
from vcache.engine.stats import Cause

_SHOWN = {
    "hits": "chunks that were there",
    "misses": "chunks that were not",
    "stored_bytes": "bytes stored",
    "retrieved_bytes": "bytes handed out to be loaded",
    "unstored_chunks": "chunks that found no room, or no server",
    "held_chunks": "chunks that are being read",
    "drafts": "chunks that are being written",
    "pins": "pins by key",
    "reads_in_flight": "lookups and loads under way",
    "reads_refused": "lookups and loads that were too many",
    "connected": "whether the metadata server answers",
    **{cause.value: f"failures: {cause.value.removeprefix('failed_').replace('_', ' ')}" for cause in Cause},
}
_gauges: dict[str, Any] = {}


def publish(core: Core, metadata: Any, config: Any) -> None:
    """Show this engine's figures as lmcache:vcache_…, by model and worker. Called again it replaces them."""
    from prometheus_client import Gauge  # LMCache brings it

    labels = (str(metadata.model_name), str(metadata.worker_id), str(metadata.role or "worker"))
    shown = weakref.ref(core)
    for name, what in _SHOWN.items():
        gauge = _gauges.get(name)
        if gauge is None:
            gauge = _gauges[name] = Gauge(
                f"lmcache:vcache_{name}", f"VCache: {what}", ("model_name", "worker_id", "role")
            )
        gauge.labels(*labels).set_function(lambda name=name: _figure(shown(), name))


def _figure(core: Core | None, name: str) -> float:
    return 0.0 if core is None or core.closed else float(core.stats()[name])
