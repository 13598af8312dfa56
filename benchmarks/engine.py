"""Store into and retrieve from a peer's segment, beside memcpy: `python -m benchmarks.engine`.

A holder on "shm:1" has the segment, this process the paged KV of Llama-3-8B (32 layers, 8 KV heads of 128,
bf16, pages of 16 tokens; 8 chunks of 32 MiB). memcpy copies as many bytes between the same segment and
private memory by the same number of threads. All contestants take turns, so that what else the machine does
hits them alike; a ratio is the median of the rounds' ratios of rates. All memory is there, and was written
and read once, before the first round counts.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.paged import BYTES, CHUNKS, LAYOUT, ORDERS, PAGES, TOKENS, Paged, peer_pool
from benchmarks.processes import DEADLINE_S, Pool
from benchmarks.report import Figure, at_least, ratio
from vcache import VCacheEngine
from vcache.bench.copy import Order, measure, memcpy
from vcache.client import Client
from vcache.errors import SegmentError
from vcache.limits import MIB

TITLE: Final = f"Engine: {CHUNKS} chunks of {LAYOUT.chunk_bytes // MIB} MiB, shared memory"
ROUNDS: Final = 15
KERNEL_ROUNDS: Final = 9
WANTED: Final[dict[Order, float]] = {"pages": 0.8, "random-pages": 0.7}
"""The least rate of store and retrieve as a share of memcpy's."""

COPIES: Final = {"store": "gather", "retrieve": "scatter"}
WORDS: Final[dict[Order, str]] = {"pages": "page-ordered", "random-pages": "random pages"}


class Subject:
    """An engine without a segment of its own, its paged KV and a pool that only it uses."""

    def __init__(self, engine: VCacheEngine, client: Client, paged: Paged) -> None:
        self.engine = engine
        self.client = client
        self.paged = paged
        self.tokens = np.arange(TOKENS)

    def empty(self) -> None:
        """Forget what is stored, so that the next store has everything to do."""
        if self.client.clear() != CHUNKS:
            raise RuntimeError("a store did not store all chunks")

    def store(self, order: Order) -> None:
        self.engine.store(self.tokens, kvcaches=self.paged.kvcaches, slot_mapping=self.paged.slots[order])

    def retrieve(self, order: Order) -> None:
        loaded = self.engine.retrieve(
            self.tokens, kvcaches=self.paged.kvcaches, slot_mapping=self.paged.slots[order]
        )
        if int(loaded.sum()) != TOKENS:
            raise RuntimeError(f"a retrieve loaded {int(loaded.sum())} of {TOKENS} tokens")

    def verify(self, order: Order) -> None:
        """Store, overwrite the pages, retrieve: every byte must be as before. Leaves the chunks stored."""
        layers = range(0, LAYOUT.num_layers, LAYOUT.num_layers - 1)
        before = [self.paged.pages(layer, order) for layer in layers]
        self.store(order)
        for layer in layers:
            self.paged.wipe(layer, order)
        self.retrieve(order)
        for layer, expected in zip(layers, before, strict=True):
            if not torch.equal(self.paged.pages(layer, order), expected):
                raise RuntimeError(f"layer {layer} came back with other bytes")


@contextmanager
def borrowed_run(client: Client) -> Iterator[Tensor]:
    """One piece of the peer's segment, as large as the chunks: reserved for memcpy and never committed."""
    reserved = client.reserve_blank(CHUNKS, layout=LAYOUT.fingerprint, size=LAYOUT.chunk_bytes)
    offsets = reserved.extents["offset"].astype(np.int64)
    if len(offsets) != CHUNKS or (np.diff(offsets) != LAYOUT.chunk_bytes).any():
        raise RuntimeError("the extents for memcpy are not one contiguous piece")
    segment = client.segment(int(reserved.extents["segment"][0]), reserved.lineage)
    borrow = None if segment is None else segment.borrow()
    if segment is None or borrow is None:
        raise SegmentError("the peer's segment cannot be mapped")
    with borrow:
        yield segment.view(int(offsets[0]), BYTES)
    client.abort(reserved.extents)


def timed(action: Callable[[], None]) -> float:
    """Seconds that the action takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _rounds(subject: Subject, segment: Tensor) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each contestant in every round, and of all gathers and scatters in them."""
    private = torch.ones(BYTES, dtype=torch.uint8)
    times: dict[str, list[float]] = {}
    _round(subject, segment, private, {})
    before = subject.engine.get_stats()
    gc.collect()
    for _ in range(ROUNDS):
        _round(subject, segment, private, times)
    after = subject.engine.get_stats()
    names = {copy: f"{copy}_seconds" for copy in COPIES.values()}
    return times, {copy: float(after[name]) - float(before[name]) for copy, name in names.items()}


def _round(subject: Subject, segment: Tensor, private: Tensor, times: dict[str, list[float]]) -> None:
    threads = torch.get_num_threads()
    for order in ORDERS:
        subject.empty()
        steps: dict[str, Callable[[], None]] = {
            f"memcpy to segment, {order}": partial(memcpy, segment, private, threads),
            f"store, {order}": partial(subject.store, order),
            f"memcpy from segment, {order}": partial(memcpy, private, segment, threads),
            f"retrieve, {order}": partial(subject.retrieve, order),
        }
        for name, step in steps.items():
            times.setdefault(name, []).append(timed(step))


@contextmanager
def connected_engine(pool: Pool, paged: Paged) -> Iterator[Subject]:
    """An engine of that pool, connected, that lends nothing itself."""
    client = pool.client()
    try:
        with VCacheEngine(
            layout=LAYOUT, model="benchmark", config=pool.config(**{"segment.size": 0})
        ) as engine:
            if not engine.wait_connected(DEADLINE_S):
                raise RuntimeError("the engine did not connect")
            yield Subject(engine, client, paged)
    finally:
        client.close()


def end_to_end() -> list[Figure]:
    """Store and retrieve by the engine, requests included."""
    with (
        peer_pool(2 * CHUNKS) as pool,
        connected_engine(pool, Paged(2 * PAGES)) as subject,
        borrowed_run(subject.client) as segment,
    ):
        segment.fill_(1)
        subject.verify("pages")
        subject.empty()
        subject.verify("random-pages")
        return list(_figures(*_rounds(subject, segment)))


def _figures(times: dict[str, list[float]], copied: dict[str, float]) -> Iterator[Figure]:
    for direction in ("to", "from"):
        both = [second for order in ORDERS for second in times[f"memcpy {direction} segment, {order}"]]
        yield rate(f"memcpy {direction} segment, {torch.get_num_threads()} threads", both)
    for name, direction in (("store", "to"), ("retrieve", "from")):
        for order in ORDERS:
            own, beside = times[f"{name}, {order}"], times[f"memcpy {direction} segment, {order}"]
            title = f"{name}, {WORDS[order]}"
            yield rate(title, own)
            yield at_least(f"{title} ÷ memcpy", ratio(beside, own), WANTED[order], "×")
    for name, copy in COPIES.items():
        seconds = sum(sum(times[f"{name}, {order}"]) for order in ORDERS)
        yield Figure(f"share of {name} that is the {copy}", f"{copied[copy] / seconds:.3f}")


def rate(name: str, seconds: list[float]) -> Figure:
    """Bytes of all chunks over the median."""
    middle = statistics.median(seconds)
    return Figure(name, f"{BYTES / middle / 1e9:.2f} GB/s ({middle * 1e3:.0f} ms)")


def kernels() -> list[Figure]:
    """Gather and scatter alone, in memory of this process' own."""
    rows = measure(LAYOUT, CHUNKS, ORDERS, rounds=KERNEL_ROUNDS)
    return [
        Figure(f"{row.name} alone, {words}", f"{row.gbytes_per_s:.2f} GB/s, {row.ratio:.2f} × memcpy")
        for row in rows
        for order, words in WORDS.items()
        if row.order == order
    ]


def run() -> list[Figure]:
    """Measure; takes some 40 s and 1.3 GiB of memory."""
    return [*end_to_end(), *kernels()]


if __name__ == "__main__":
    from benchmarks.report import main

    main(TITLE, run)
