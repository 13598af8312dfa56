"""Gather and scatter beside LMCache's own kernel, `multi_layer_kv_transfer`, on the same tensors.

Only its compiled modules are loaded, not the package with its many requirements: what is compared is the
kernel. It is called as LMCache calls it: once per chunk, slots and the layers' addresses in GPU memory
already, chunks of `[K/V, layer, token, hidden]`. Ours is called as the engine calls it: once, with the slots
in host memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.gpu.copies import repeats_of
from benchmarks.gpu.subject import COUNTS, LAYOUTS, PAGE_TOKENS, Subject, counts_that_fit, own_segment
from benchmarks.report import Figure, gbytes_per_s, interleaved, ratio
from vcache.bench.clock import finish, seconds_on
from vcache.layout import KVLayout

TITLE: Final = "Beside LMCache's multi_layer_kv_transfer, same tensors"
ROUNDS: Final = 15
WANTED: Final = 1.0

_PACKAGE: Final = "lmcache"


class NotHere(Exception):
    """LMCache's kernel cannot be called here; the message says why."""


@dataclass(frozen=True)
class LMCacheKernel:
    """`multi_layer_kv_transfer` (lmcache 0.5) with the enumerations that it takes."""

    version: str
    transfer: Callable[..., None]
    native: ModuleType

    @classmethod
    def load(cls) -> LMCacheKernel:
        """The installed one. Raises NotHere."""
        try:
            found = version(_PACKAGE)
        except PackageNotFoundError:
            raise NotHere("not installed") from None
        try:
            _expose_without_importing(_PACKAGE)
            native = importlib.import_module(f"{_PACKAGE}.lmcache_native")
            ops = importlib.import_module(f"{_PACKAGE}.cuda_ops")
        except (ImportError, OSError) as error:
            raise NotHere(f"lmcache {found} does not load: {' '.join(str(error).split())}") from error
        return cls(found, ops.multi_layer_kv_transfer, native)

    def calls(self, subject: Subject, chunks: Sequence[Tensor] | None = None) -> tuple[Action, Action]:
        """Gather and scatter of all chunks of a subject, or of `chunks` of the same sizes in other memory."""
        layout, device = subject.layout, subject.device
        addresses = torch.tensor([layer.data_ptr() for layer in subject.kvcaches], dtype=torch.int64).to(
            device
        )
        slots = subject.slots.to(device)
        formats = self.native.EngineKVFormat
        engine_format = formats.NL_X_TWO_NB_BS_NH_HS if layout.kv_parts == 2 else formats.NL_X_NB_BS_HS
        hidden = layout.num_kv_heads * layout.head_size
        shape = (layout.kv_parts, layout.num_layers, layout.chunk_tokens, hidden)
        dtype: torch.dtype = getattr(torch, layout.dtype)
        shaped = [chunk.view(dtype).view(shape) for chunk in (subject.chunks if chunks is None else chunks)]

        def each(direction: Any) -> None:
            for number, chunk in enumerate(shaped):
                begin = number * layout.chunk_tokens
                self.transfer(
                    chunk,
                    addresses,
                    slots[begin : begin + layout.chunk_tokens],
                    device,
                    subject.paged.num_slots,
                    direction,
                    engine_format,
                    block_size=PAGE_TOKENS,
                    head_size=layout.head_size,
                )

        directions = self.native.TransferDirection
        return partial(each, directions.D2H), partial(each, directions.H2D)


Action = Callable[[], None]


def _expose_without_importing(package: str) -> None:
    """Have `package.module` importable without the package's own `__init__`, unless that has run already."""
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is no package")
    bare = ModuleType(package)
    bare.__path__ = [str(Path(each)) for each in spec.submodule_search_locations]
    sys.modules[package] = bare


def run(labels: Sequence[str]) -> Iterator[Figure]:
    """Measure on the first device, in a segment of this process."""
    return figures(labels[0], LAYOUTS, COUNTS)


def figures(label: str, layouts: Mapping[str, KVLayout], counts: Sequence[int]) -> Iterator[Figure]:
    """The figures of each layout and count of chunks that fits, or why there are none."""
    try:
        theirs = LMCacheKernel.load()
    except NotHere as error:
        yield Figure("LMCache's kernel", str(error))
        return
    yield Figure("LMCache", theirs.version)
    for name, layout in layouts.items():
        for count in counts_that_fit(layout, label, counts):
            with own_segment(layout, count, label) as subject:
                yield from beside(name, subject, theirs, ROUNDS)


def beside(name: str, subject: Subject, theirs: LMCacheKernel, rounds: int) -> Iterator[Figure]:
    """Both directions of one subject, ours and theirs in turns. RuntimeError if either moves other bytes."""
    their_gather, their_scatter = theirs.calls(subject)
    _check_their_round_trip(subject, their_gather, their_scatter)
    subject.verify()
    actions: list[Action] = [subject.gather, their_gather, subject.scatter, their_scatter]
    for action in actions:
        action()
    finish(subject.device)
    repeats = repeats_of(subject.bytes)
    contestants = [partial(seconds_on, subject.device, action, repeats) for action in actions]
    gathered, they_gathered, scattered, they_scattered = interleaved(contestants, rounds)
    count = len(subject.chunks)
    for what, own, their in (("store", gathered, they_gathered), ("retrieve", scattered, they_scattered)):
        times = ratio(their, own)
        yield Figure(
            f"{name}, {count} chunk{'s' if count > 1 else ''}: {what}",
            f"{times:.2f} × LMCache ({gbytes_per_s(subject.bytes, their)})",
            f"≥ {WANTED:.0f} ×",
            times >= WANTED,
        )


def _check_their_round_trip(subject: Subject, gather: Action, scatter: Action) -> None:
    """Their kernel, too, must move the very bytes: else it was called wrongly, and its figure is worth
    nothing.
    """
    before = subject.kvcaches[-1].clone()
    gather()
    finish(subject.device)
    subject.kvcaches[-1].zero_()
    scatter()
    finish(subject.device)
    for got, wanted in zip(subject.moved(subject.kvcaches[-1]), subject.moved(before), strict=True):
        if not torch.equal(got, wanted):
            raise RuntimeError("LMCache's kernel did not bring the last layer's bytes back")
