"""Engines against a real server: what their tests store in them and load, and what they count."""

from __future__ import annotations

from typing import Any

import torch

from tests.processes.content import AXES, LAYOUT, PagedPrompt
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S
from vcache.engine import VCacheEngine
from vcache.keys import KeyChain
from vcache.layout import KVLayout

CHUNK = LAYOUT.chunk_tokens
KEYS = KeyChain(LAYOUT.fingerprint, "test-model")


def make(pool: Pool, *, size: int | str = 0, layout: KVLayout = LAYOUT, **given: Any) -> VCacheEngine:
    """An engine of the pool, connected if there is a server; it lends a segment of `size`."""
    options: dict[str, Any] = {
        "model": "test-model",
        "kv_axes": AXES,
        "device": "shm:0",
        "segment.size": size,
    }
    options["tiers.prefetch"] = False  # so that it is the retrieve that reads below, and the counters say so
    made = VCacheEngine(layout=layout, **{**pool.client_config(), **options, **given})
    assert made.wait_connected(DEADLINE_S) or not pool.path.exists()
    return made


def store(engine: VCacheEngine, seed: int, count: int, **given: Any) -> None:
    """Store a prompt."""
    paged = PagedPrompt(seed, count).fill()
    engine.store(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots, **given)


def load(engine: VCacheEngine, seed: int, count: int, mask: Any = None) -> list[bool]:
    """Retrieve a prompt and check every byte of it; of each token, whether it was loaded."""
    paged = PagedPrompt(seed, count)
    loaded = engine.retrieve(paged.tokens, mask, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
    assert loaded.dtype == torch.bool
    assert paged.wrong_tokens(loaded) == 0
    return list(loaded.tolist())


def counted(engine: VCacheEngine, *names: str) -> list[int]:
    """These of its statistics."""
    stats = engine.get_stats()
    return [int(stats[name]) for name in names]
