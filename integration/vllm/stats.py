"""Statistics: what each half counted since it was last asked, and how Prometheus sees it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from vcache.engine.stats import Cause, Counters

_FAILURES = {cause.value: cause.value.removeprefix("failed_") for cause in Cause}

_TAKEN = {
    "retrieved_bytes": "loaded_bytes",
    "retrieved_chunks": "loaded_chunks",
    "stored_bytes": "stored_bytes",
    "stored_chunks": "stored_chunks",
    "present_chunks": "present_chunks",
    "tier_prefetched_chunks": "fetched_chunks",
    "tier_written_chunks": "written_chunks",
}
"""Counters of the engine's layers, and what they are called here."""

_COUNTERS = {
    "hit_tokens": "Tokens whose KV was loaded from the pool instead of computed.",
    "loaded_bytes": "Bytes loaded from the pool.",
    "loaded_chunks": "Chunks loaded from the pool.",
    "stored_bytes": "Bytes stored in the pool.",
    "stored_chunks": "Chunks stored in the pool.",
    "present_chunks": "Chunks that were not stored since the pool had them.",
    "fetched_chunks": "Chunks brought up from lower tiers.",
    "written_chunks": "Chunks written to lower tiers.",
    "failed_loads": "Loads that failed; their tokens were computed.",
}
_SECONDS = {
    "load_seconds": "Seconds that one load took.",
    "store_seconds": "Seconds that one store took.",
}
_BUCKETS = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]


@dataclass
class VCacheStats(KVConnectorStats):
    """Counts by name, seconds as lists of observations, failures by cause."""

    data: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget all."""
        self.data = {}

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> VCacheStats:
        """Add another one's to these."""
        for name, value in other.data.items():
            if isinstance(value, dict):
                mine = self.data.setdefault(name, {})
                for cause, count in value.items():
                    mine[cause] = mine.get(cause, 0) + count
            elif name in self.data:
                self.data[name] = self.data[name] + value
            else:
                self.data[name] = list(value) if isinstance(value, list) else value
        return self

    def reduce(self) -> dict[str, int | float]:
        """A line's worth, for the log."""
        line: dict[str, int | float] = {name: self.data[name] for name in _COUNTERS if name in self.data}
        for name in _SECONDS:
            if seconds := self.data.get(name):
                line[f"{name.removesuffix('_seconds')}_mean_ms"] = round(1e3 * sum(seconds) / len(seconds), 3)
        for cause, count in self.data.get("failures", {}).items():
            line[f"failed_{cause}"] = count
        return line


class Observed:
    """What happened since the last `take`. Thread-safe."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._before: dict[str, int | float] = {}
        self._data: dict[str, Any] = {}
        self._lock = threading.Lock()

    def add(self, **counts: int) -> None:
        """Count something."""
        with self._lock:
            for name, count in counts.items():
                self._data[name] = self._data.get(name, 0) + count

    def seconds(self, name: str, seconds: float) -> None:
        """Note how long something took."""
        with self._lock:
            self._data.setdefault(name, []).append(seconds)

    def take(self) -> VCacheStats | None:
        """All of it, once; None if nothing happened."""
        now = self._counters.snapshot()
        with self._lock:
            data, self._data = self._data, {}
            before, self._before = self._before, now
        for name, called in _TAKEN.items():
            if count := now[name] - before.get(name, 0):
                data[called] = data.get(called, 0) + count
        failures = {cause: now[name] - before.get(name, 0) for name, cause in _FAILURES.items()}
        if failures := {cause: count for cause, count in failures.items() if count}:
            data["failures"] = failures
        return VCacheStats(data) if data else None


class VCachePromMetrics(KVConnectorPromMetrics):
    """vllm:vcache_* metrics, by engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counts = {
            name: self._counter_cls(name=f"vllm:vcache_{name}", documentation=text, labelnames=labelnames)
            for name, text in _COUNTERS.items()
        }
        self._histograms = {
            name: self._histogram_cls(
                name=f"vllm:vcache_{name}", documentation=text, buckets=_BUCKETS, labelnames=labelnames
            )
            for name, text in _SECONDS.items()
        }
        self._failures = self._counter_cls(
            name="vllm:vcache_failures",
            documentation="Failures, by cause; all of them are misses.",
            labelnames=[*labelnames, "cause"],
        )
        for values in per_engine_labelvalues.values():  # from the start, at zero
            for metric in (*self._counts.values(), *self._histograms.values()):
                metric.labels(*values)
            for cause in _FAILURES.values():
                self._failures.labels(*values, cause)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what a step reported."""
        values = self.per_engine_labelvalues[engine_idx]
        for name, metric in self._counts.items():
            if count := transfer_stats_data.get(name):
                metric.labels(*values).inc(count)
        for name, histogram in self._histograms.items():
            for seconds in transfer_stats_data.get(name, ()):
                histogram.labels(*values).observe(seconds)
        for cause, count in transfer_stats_data.get("failures", {}).items():
            self._failures.labels(*values, cause).inc(count)
