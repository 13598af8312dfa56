"""What a store costs an engine while what it stores is written to a lower tier."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Final

import numpy as np
import torch

from benchmarks.processes import DEADLINE_S, Pool
from benchmarks.report import Figure, at_most
from vcache import KVLayout, VCacheEngine
from vcache.limits import MIB
from vcache.segment import DATA_OFFSET
from vcache.tiers import Tier

ROUNDS: Final = 4
SECONDS: Final = 4.0
"""How long a round offers its load."""

PAGE_TOKENS: Final = 16
WANTED: Final = 1.05
ROOM_BYTES: Final = 2 << 30


class Offered:
    """An engine that stores a chunk at a time, at a fixed rate. number: tells its chunks from those of
    another, which would be there already.
    """

    def __init__(self, pool: Pool, layout: KVLayout, tiers: list[Tier], number: int) -> None:
        config = pool.config(**{"segment.size": 0, "tiers.deadline_ms": 60_000})
        self.engine = VCacheEngine(layout=layout, model=f"benchmark-{number}", config=config, tiers=tiers)
        if not self.engine.wait_connected(DEADLINE_S):
            raise RuntimeError("no connection to the server")
        pages = layout.chunk_tokens // PAGE_TOKENS
        shape = (2, pages, PAGE_TOKENS, layout.num_kv_heads, layout.head_size)
        self._paged = [torch.ones(shape, dtype=torch.bfloat16) for _ in range(layout.num_layers)]
        self._slots = torch.arange(layout.chunk_tokens)
        self._chunk = 0

    def store(self) -> float:
        """Store a new chunk; seconds."""
        self._chunk += 1
        count = len(self._slots)
        tokens = np.arange(self._chunk * count, (self._chunk + 1) * count)
        begin = time.perf_counter()
        self.engine.store(tokens, kvcaches=self._paged, slot_mapping=self._slots)
        return time.perf_counter() - begin

    def round(self, interval_s: float) -> list[float]:
        """Store every `interval_s`, in time with the clock; seconds of each."""
        taken: list[float] = []
        begin = time.perf_counter()
        for number in range(max(int(SECONDS / interval_s), 8)):
            time.sleep(max(begin + number * interval_s - time.perf_counter(), 0))
            taken.append(self.store())
        self.engine.flush_tiers(DEADLINE_S)
        return taken


def stores(tier: Tier, size: int, bytes_per_s: float) -> Iterator[Figure]:
    """Latency of stores with write-through and without any tier, at an offered load, in turns."""
    tokens = 256 * size // (32 * MIB)
    layout = KVLayout(num_layers=32, num_kv_heads=8, head_size=128, dtype="bfloat16", chunk_tokens=tokens)
    with Pool() as pool, ExitStack() as ending:
        pool.start_server()
        pool.start_holder("shm:1", DATA_OFFSET + ROOM_BYTES)
        without, through = Offered(pool, layout, [], 0), Offered(pool, layout, [tier], 1)
        for offered in (without, through):
            ending.callback(offered.engine.close)
            offered.round(size / bytes_per_s)  # maps, populates, imports
        alone: list[list[float]] = []
        beside: list[list[float]] = []
        for _ in range(ROUNDS):
            alone.append(without.round(size / bytes_per_s))
            beside.append(through.round(size / bytes_per_s))
        dropped = through.engine.get_stats()["tier_dropped_chunks"]
    name = f"{tier.name}, {size // MIB} MiB: store"
    rate = f"{bytes_per_s / 1e9:.2f} GB/s offered"
    all_of = [sorted(chain.from_iterable(rounds)) for rounds in (beside, alone)]
    medians = [statistics.median(calls) * 1e3 for calls in all_of]
    tails = [calls[int(0.99 * (len(calls) - 1))] * 1e3 for calls in all_of]
    yield Figure(f"{name}, write-through / none, {rate}", f"{medians[0]:.2f} / {medians[1]:.2f} ms")
    yield Figure(f"{name}, p99", f"{tails[0]:.2f} / {tails[1]:.2f} ms")
    yield Figure(f"{name}, chunks that found the queue full", f"{dropped}")
    rounds = [statistics.median(a) / statistics.median(b) for a, b in zip(beside, alone, strict=True)]
    yield at_most(f"{name}, write-through over none", statistics.median(rounds), WANTED, "×")
