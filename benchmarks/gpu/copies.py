"""Store and retrieve payload bandwidth: the kernels beside a cudaMemcpy of the same bytes in the same run.

Two layouts; chunks in a segment of this process, and in one of another process, on another GPU where there is
one. Pages of 16 tokens in random order. Payload counts once, though it is read and written. All contestants
take turns, and every measurement is of the GPU's own time (`vcache.bench.clock`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Final

from benchmarks.gpu.subject import COUNTS, LAYOUTS, Subject, counts_that_fit, own_segment, peer_segment
from benchmarks.report import Figure, gbytes_per_s, interleaved, ratio
from vcache.bench.clock import finish, seconds_on
from vcache.layout import KVLayout
from vcache.limits import GIB

TITLE: Final = "Store and retrieve beside cudaMemcpy, pages of 16 tokens in random order"
ROUNDS: Final = 15
WANTED: Final = 0.95
WANTED_FROM_CHUNKS: Final = 8
"""One chunk takes some 20 µs: what is left of a launch then counts."""

_REPEATS_MAX: Final = 16


def run(labels: Sequence[str]) -> Iterator[Figure]:
    """Measure with the paged KV on the first device, and the peer's segment on the second if there is one."""
    return figures(labels, LAYOUTS, COUNTS, ROUNDS)


def figures(
    labels: Sequence[str], layouts: Mapping[str, KVLayout], counts: Sequence[int], rounds: int
) -> Iterator[Figure]:
    """The figures of each layout, place and count of chunks that fit, as they come."""
    own, peer = labels[0], labels[min(1, len(labels) - 1)]
    where = "peer GPU" if peer != own else "peer process, same GPU"
    for name, layout in layouts.items():
        fitting = counts_that_fit(layout, own, counts)
        for count in fitting:
            with own_segment(layout, count, own) as subject:
                yield from measured(f"{name}, own segment", subject, rounds)
        for count in fitting:
            with _peer(layout, count, peer, own) as subject:
                yield from measured(f"{name}, {where}", subject, rounds)
        if missing := [count for count in counts if count not in fitting]:
            yield Figure(f"{name}, {missing} chunks", "left out: too little memory")


def _peer(layout: KVLayout, count: int, holder: str, reader: str) -> AbstractContextManager[Subject]:
    return peer_segment(layout, count, holder, reader)


def measured(what: str, subject: Subject, rounds: int = ROUNDS) -> Iterator[Figure]:
    """The two directions of one subject, with their shares of memcpy's rate."""
    subject.verify()
    repeats = repeats_of(subject.bytes)
    actions = [subject.memcpy_to, subject.gather, subject.memcpy_from, subject.scatter]
    for action in actions:
        action()
    finish(subject.device)
    contestants = [partial(seconds_on, subject.device, action, repeats) for action in actions]
    to, gathered, back, scattered = interleaved(contestants, rounds)
    count = len(subject.chunks)
    for name, own, beside in (("store", gathered, to), ("retrieve", scattered, back)):
        share = ratio(beside, own)
        has_bound = count >= WANTED_FROM_CHUNKS
        yield Figure(
            f"{what}, {count} chunk{'s' if count > 1 else ''}: {name}",
            f"{gbytes_per_s(subject.bytes, own)}, {share:.2f} × memcpy",
            f"≥ {WANTED} ×" if has_bound else "",
            share >= WANTED if has_bound else None,
        )


def repeats_of(nbytes: int) -> int:
    """So many copies in a row that about a GiB is moved, and no more than can be queued ahead."""
    return max(1, min(_REPEATS_MAX, GIB // max(nbytes, 1)))
