"""The way through host memory, which the pool does without: pinned memory between the GPU and the GPU.

A hop: what is in host memory already is brought into paged KV (host → device by cudaMemcpyAsync, then
scatter), beside a retrieve from the pool. There and back: paged KV → host → paged KV, beside a store and a
retrieve. Where LMCache is installed its kernel goes between paged KV and pinned memory directly, as its CPU
backend has it do; the better of the two ways is what the pool is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Final

import torch

from benchmarks.gpu.lmcache_kernel import Action, LMCacheKernel, NotHere
from benchmarks.gpu.subject import COUNTS, Subject, counts_that_fit, own_segment, peer_segment
from benchmarks.report import Figure, gbytes_per_s, interleaved, ratio
from vcache.bench.clock import finish, seconds_on
from vcache.bench.copy import LLAMA3_8B
from vcache.kernels import gather_tokens, scatter_tokens
from vcache.layout import KVLayout

TITLE: Final = "Beside the way through pinned host memory"
ROUNDS: Final = 9


class ThroughHost:
    """The subject's chunks once more, in pinned host memory, and on the device what a copy engine needs."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        size = subject.layout.chunk_bytes
        self.host = torch.empty(subject.bytes, dtype=torch.uint8)
        if subject.device.type == "cuda":
            self.host = self.host.pin_memory()
        self.staged = torch.empty_like(subject.flat)
        self.staged_chunks = [self.staged[at : at + size] for at in range(0, subject.bytes, size)]
        self.host_chunks = [self.host[at : at + size] for at in range(0, subject.bytes, size)]

    def store(self) -> None:
        """Paged KV → device, contiguous → host."""
        gather_tokens(self._subject.paged, self._subject.slots, self.staged_chunks)
        self.host.copy_(self.staged, non_blocking=True)

    def retrieve(self) -> None:
        """Host → device, contiguous → paged KV."""
        self.staged.copy_(self.host, non_blocking=True)
        scatter_tokens(self._subject.paged, self._subject.slots, self.staged_chunks)

    def check(self) -> None:
        """RuntimeError unless the bytes come back."""
        before = self._subject.kvcaches[-1].clone()
        self.store()
        finish(self._subject.device)
        self._subject.kvcaches[-1].zero_()
        self.retrieve()
        finish(self._subject.device)
        pairs = zip(self._subject.moved(self._subject.kvcaches[-1]), self._subject.moved(before), strict=True)
        if not all(torch.equal(got, wanted) for got, wanted in pairs):
            raise RuntimeError("what went through host memory came back with other bytes")


def run(labels: Sequence[str]) -> Iterator[Figure]:
    """Measure with the paged KV on the first device, the pool's segment on the second if there is one."""
    return figures(labels, {"Llama-3-8B": LLAMA3_8B}, COUNTS, ROUNDS)


def figures(
    labels: Sequence[str], layouts: Mapping[str, KVLayout], counts: Sequence[int], rounds: int
) -> Iterator[Figure]:
    """The figures of each layout and count of chunks that fits, as they come."""
    own, peer = labels[0], labels[min(1, len(labels) - 1)]
    for name, layout in layouts.items():
        for count in counts_that_fit(layout, own, counts):
            one = own_segment(layout, count, own) if own == peer else peer_segment(layout, count, peer, own)
            with one as subject:
                where = "own GPU" if own == peer else "peer GPU"
                yield from _beside(
                    f"{name}, {count} chunk{'s' if count > 1 else ''}, {where}", subject, rounds
                )


def _beside(what: str, subject: Subject, rounds: int) -> Iterator[Figure]:
    through = ThroughHost(subject)
    through.check()
    subject.verify()
    ways: dict[str, tuple[Action, Action]] = {"cudaMemcpyAsync": (through.store, through.retrieve)}
    try:
        ways["LMCache's kernel"] = LMCacheKernel.load().calls(subject, through.host_chunks)
    except NotHere as error:
        yield Figure(f"{what}: LMCache's kernel to host memory", str(error))
    actions = [subject.gather, subject.scatter, *(action for way in ways.values() for action in way)]
    for action in actions:
        action()
    finish(subject.device)
    times = interleaved([partial(seconds_on, subject.device, action) for action in actions], rounds)
    stored, retrieved = times[0], times[1]
    by_way = {name: (times[2 + 2 * at], times[3 + 2 * at]) for at, name in enumerate(ways)}
    for name, (there, back) in by_way.items():
        yield Figure(f"{what}: retrieve by {name}", gbytes_per_s(subject.bytes, back))
        yield Figure(f"{what}: store by {name}", gbytes_per_s(subject.bytes, there))
    yield Figure(f"{what}: retrieve from the pool", gbytes_per_s(subject.bytes, retrieved))
    hop = min(ratio(back, retrieved) for _, back in by_way.values())
    both = min(ratio(_sums(there, back), _sums(stored, retrieved)) for there, back in by_way.values())
    yield Figure(f"{what}: the pool is faster than the best of them, a hop", f"{hop:.1f} ×")
    yield Figure(f"{what}: there and back", f"{both:.1f} ×")


def _sums(some: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(some, others, strict=True)]
