"""A retrieve of one chunk end to end: microseconds of each part, beside the engine's own call.

A server of its own, a holder process with the segment, this process with the paged KV. The parts are those of
`vcache.engine.retrieve`: acquire; borrow the memory and launch; wait for the event; fence and release.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Final

import numpy as np
import torch

from benchmarks.gpu.device import torch_device
from benchmarks.gpu.subject import axes_of, paged_layers, segment_bytes
from benchmarks.processes import DEADLINE_S, Pool
from benchmarks.report import Figure
from vcache import VCacheEngine
from vcache.bench.clock import recorded_event
from vcache.bench.copy import LLAMA3_8B
from vcache.client import Client
from vcache.kernels import PagedKV, scatter_tokens
from vcache.keys import KeyChain
from vcache.layout import KVLayout

TITLE: Final = "A retrieve of one chunk, end to end"
ROUNDS: Final = 300
WARM_UP: Final = 30

PARTS: Final = ("acquire", "borrow and launch", "until the copy is done", "fence and release")
_MODEL: Final = "benchmark"


def run(labels: Sequence[str]) -> Iterator[Figure]:
    """Measure with the paged KV on the first device, the holder on the second if there is one."""
    return figures(labels[0], labels[min(1, len(labels) - 1)], LLAMA3_8B, ROUNDS)


def figures(own: str, holder: str, layout: KVLayout, rounds: int) -> Iterator[Figure]:
    """The figures of the whole and of its parts."""
    with Pool() as pool, ExitStack() as stack:
        pool.start_server()
        pool.start_holder(holder, segment_bytes(layout, 4))
        config = pool.config(device=own, **{"segment.size": 0})
        engine = stack.enter_context(
            VCacheEngine(layout=layout, model=_MODEL, kv_axes=axes_of(layout), config=config)
        )
        if not engine.wait_connected(DEADLINE_S):
            raise RuntimeError("the engine did not connect")
        client = pool.client(device=own)
        stack.callback(client.close)
        one = OneChunk(layout, client, engine, own)
        one.store()
        for _ in range(WARM_UP):
            one.whole()
            one.in_parts()
        whole = [one.whole() for _ in range(rounds)]
        parts = [one.in_parts() for _ in range(rounds)]
    yield Figure("VCacheEngine.retrieve", _us(whole))
    for name, seconds in zip(PARTS, zip(*parts, strict=True), strict=True):
        yield Figure(name, _us(seconds))
    yield Figure("the parts together", _us([sum(each) for each in parts]))


class OneChunk:
    """One chunk in the holder's segment, and the two ways to load it."""

    def __init__(self, layout: KVLayout, client: Client, engine: VCacheEngine, own: str) -> None:
        self._layout = layout
        self._client = client
        self._engine = engine
        self._device = torch_device(own)
        self._kvcaches = paged_layers(layout, layout.chunk_tokens, self._device)
        self._paged = PagedKV.from_tensors(self._kvcaches, axes_of(layout), layout)
        self._slots = torch.arange(layout.chunk_tokens)
        self._tokens = np.arange(layout.chunk_tokens)
        chain = KeyChain(layout.fingerprint, _MODEL, 0, "", "")
        self._keys = chain.keys(self._tokens, layout.chunk_tokens, partial=False)

    def store(self) -> None:
        """Put it there."""
        self._engine.store(self._tokens, kvcaches=self._kvcaches, slot_mapping=self._slots)
        if self._client.lookup(self._keys, self._layout.fingerprint) != 1:
            raise RuntimeError("the chunk was not stored")

    def whole(self) -> float:
        """Seconds of the engine's call."""
        begin_s = time.perf_counter()
        loaded = self._engine.retrieve(self._tokens, kvcaches=self._kvcaches, slot_mapping=self._slots)
        seconds = time.perf_counter() - begin_s
        if not bool(loaded.all()):
            raise RuntimeError("a retrieve missed")
        return seconds

    def in_parts(self) -> tuple[float, ...]:
        """Seconds of each of PARTS."""
        at_s = [time.perf_counter()]
        grant = self._client.acquire(self._keys, layout=self._layout.fingerprint)
        at_s.append(time.perf_counter())
        extent = grant.extents[0]
        segment = self._client.segment(int(extent["segment"]), grant.lineage)
        borrow = None if segment is None else segment.borrow()
        if segment is None or borrow is None:
            raise RuntimeError("the holder's segment cannot be mapped: see the log")
        with borrow:
            chunk = segment.view(int(extent["offset"]), int(extent["length"]))
            scatter_tokens(self._paged, self._slots, [chunk])
            event = self._recorded()
            at_s.append(time.perf_counter())
            if event is not None:
                event.synchronize()
            del chunk
        at_s.append(time.perf_counter())
        if not self._client.intact(grant):
            raise RuntimeError("the fence was broken in a pool that nobody else uses")
        self._client.release(grant)
        at_s.append(time.perf_counter())
        return tuple(after - before for before, after in pairwise(at_s))

    def _recorded(self) -> torch.cuda.Event | None:
        if self._device.type == "cpu":
            return None
        with torch.cuda.device(self._device):
            return recorded_event()


def _us(seconds: Sequence[float]) -> str:
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return f"{statistics.median(ordered) * 1e6:,.0f} µs (p99 {p99 * 1e6:,.0f})"
