"""What is moved: chunks in a segment, own or a peer's, and paged KV whose pages are in random order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Final

import torch
from torch import Tensor

from benchmarks.gpu.device import give_back_cache, spendable_bytes, torch_device
from benchmarks.processes import Pool
from vcache.bench.clock import finish
from vcache.bench.copy import LLAMA3_8B, slots_of
from vcache.kernels import LaunchOptions, PagedKV, gather_tokens, prepare, scatter_tokens
from vcache.kernels.launch import NO_LIMIT
from vcache.layout import KVLayout
from vcache.limits import EXTENT_ALIGN_BYTES, SEGMENT_ALIGN_BYTES
from vcache.segment import DATA_OFFSET, allocate

MLA: Final = KVLayout(
    num_layers=61, kv_parts=1, num_kv_heads=1, head_size=576, dtype="bfloat16", chunk_tokens=256
)
"""DeepSeek-V3's: one latent of 512 and 64 a token and layer."""

LAYOUTS: Final = {"Llama-3-8B": LLAMA3_8B, "MLA": MLA}
COUNTS: Final = (1, 8, 64)
PAGE_TOKENS: Final = 16

_COPIES_OF_MEMORY: Final = 7
"""Of the chunks' bytes: paged KV has twice the pages, a peer's segment has room for twice the chunks, memcpy
and the way through the host copy from as many bytes each, and the check keeps some.
"""


class Subject:
    """`count` chunks and paged KV for twice as many tokens. What is in the pages is random.

    device: of the paged KV. chunks: uint8, in a segment; runs: the same memory in as few pieces as it has,
    each with its place in flat. flat: as many bytes beside the paged KV, for memcpy.
    """

    def __init__(self, layout: KVLayout, chunks: Sequence[Tensor], device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self.chunks = list(chunks)
        self.runs = _runs(self.chunks)
        self.bytes = layout.chunk_bytes * len(self.chunks)
        self.flat = torch.ones(self.bytes, dtype=torch.uint8, device=device)
        tokens = layout.chunk_tokens * len(self.chunks)
        pages = 2 * -(-tokens // PAGE_TOKENS)
        self.slots = slots_of("random-pages", pages, PAGE_TOKENS, tokens)
        self.kvcaches = paged_layers(layout, tokens, device)
        self.paged = PagedKV.from_tensors(self.kvcaches, axes_of(layout), layout)
        prepare(self.paged)

    def gather(self, options: LaunchOptions = NO_LIMIT) -> None:
        """Paged KV → segment, as a store copies."""
        gather_tokens(self.paged, self.slots, self.chunks, None, options)

    def scatter(self, options: LaunchOptions = NO_LIMIT) -> None:
        """Segment → paged KV, as a retrieve copies."""
        scatter_tokens(self.paged, self.slots, self.chunks, None, options)

    def memcpy_to(self) -> None:
        """As many bytes to where the chunks are, from beside the paged KV."""
        for run, (begin, end) in self.runs:
            run.copy_(self.flat[begin:end], non_blocking=True)

    def memcpy_from(self) -> None:
        """As many bytes from where the chunks are, to beside the paged KV."""
        for run, (begin, end) in self.runs:
            self.flat[begin:end].copy_(run, non_blocking=True)

    def verify(self) -> None:
        """Gather, wipe the pages, scatter: RuntimeError unless every byte is as before."""
        layers = sorted({0, self.layout.num_layers - 1})
        before = [self.kvcaches[layer].clone() for layer in layers]
        self.gather()
        finish(self.device)
        for tensor in self.kvcaches:
            tensor.zero_()
        self.scatter()
        finish(self.device)
        for layer, expected in zip(layers, before, strict=True):
            for got, wanted in zip(self.moved(self.kvcaches[layer]), self.moved(expected), strict=True):
                if not torch.equal(got, wanted):
                    raise RuntimeError(
                        f"layer {layer} came back with other bytes: no figure of this is worth any"
                    )

    def moved(self, layer: Tensor) -> Iterator[Tensor]:
        """Of each K/V part, the words at the slots that are moved."""
        words = layer.view(torch.int16 if layer.element_size() == 2 else torch.uint8)
        slots = self.slots.to(self.device)
        for part in words if self.layout.kv_parts == 2 else [words]:
            yield part.flatten(0, 1)[slots]


def axes_of(layout: KVLayout) -> str:
    """How `paged_layers` are spelled."""
    return "psd" if layout.kv_parts == 1 and layout.num_kv_heads == 1 else "kpshd"


def paged_layers(layout: KVLayout, tokens: int, device: torch.device) -> list[Tensor]:
    """Paged tensors, one per layer, with random content and twice the pages that so many tokens need."""
    pages = 2 * -(-tokens // PAGE_TOKENS)
    return [_paged_layer(layout, pages, device, layer) for layer in range(layout.num_layers)]


def _paged_layer(layout: KVLayout, pages: int, device: torch.device, layer: int) -> Tensor:
    inner = (layout.head_size,) if layout.kv_parts == 1 else (layout.num_kv_heads, layout.head_size)
    shape = (*((2,) if layout.kv_parts == 2 else ()), pages, PAGE_TOKENS, *inner)
    dtype: torch.dtype = getattr(torch, layout.dtype)
    words = torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(layer)
    words.view(torch.uint8).random_(0, 256, generator=generator)
    return words


def _runs(chunks: Sequence[Tensor]) -> list[tuple[Tensor, tuple[int, int]]]:
    """The chunks as few long pieces, each with its place in `flat`: memcpy is not to be slow for being cut
    up.
    """
    ordered = sorted(chunks, key=lambda chunk: chunk.data_ptr())
    runs: list[tuple[Tensor, tuple[int, int]]] = []
    begin = 0
    while ordered:
        first = ordered[0]
        count = 1
        while count < len(ordered) and ordered[count].data_ptr() == first.data_ptr() + count * len(first):
            count += 1
        length = count * len(first)
        runs.append((first.as_strided((length,), (1,)), (begin, begin + length)))
        begin += length
        ordered = ordered[count:]
    return runs


def counts_that_fit(layout: KVLayout, label: str, counts: Sequence[int] = COUNTS) -> list[int]:
    """Of `counts`, the numbers of chunks for which the device has memory."""
    room = spendable_bytes(label)
    return [count for count in counts if count * layout.chunk_bytes * _COPIES_OF_MEMORY <= room]


def segment_bytes(layout: KVLayout, count: int) -> int:
    """The size of a segment with room for so many chunks, whatever the device."""
    extent = -(-layout.chunk_bytes // EXTENT_ALIGN_BYTES) * EXTENT_ALIGN_BYTES
    wanted = DATA_OFFSET + count * extent
    return -(-wanted // SEGMENT_ALIGN_BYTES) * SEGMENT_ALIGN_BYTES


@contextmanager
def own_segment(layout: KVLayout, count: int, label: str) -> Iterator[Subject]:
    """Chunks in a segment of this process on `label`, paged KV on the same device."""
    give_back_cache(torch_device(label))
    with ExitStack() as stack:
        segment = stack.enter_context(allocate(label, segment_bytes(layout, count)))
        borrow = segment.borrow()
        assert borrow is not None, "our own segment, which nobody closed"
        stack.enter_context(borrow)
        begins = range(DATA_OFFSET, DATA_OFFSET + count * layout.chunk_bytes, layout.chunk_bytes)
        chunks = [segment.view(begin, layout.chunk_bytes) for begin in begins]
        subject = Subject(layout, chunks, torch_device(label))
        stack.callback(partial(_let_go, subject))
        del chunks
        yield subject


@contextmanager
def peer_segment(layout: KVLayout, count: int, holder: str, reader: str) -> Iterator[Subject]:
    """Chunks in a segment that another process holds on `holder`; paged KV of this process on `reader`."""
    give_back_cache(torch_device(holder))
    with Pool() as pool, ExitStack() as stack:
        pool.start_server()
        pool.start_holder(holder, segment_bytes(layout, 2 * count))
        client = pool.client(device=reader)
        stack.callback(client.close)
        reserved = client.reserve_blank(count, layout=layout.fingerprint, size=layout.chunk_bytes)
        if len(reserved.extents) != count:
            raise RuntimeError(
                f"the holder on {holder} had room for {len(reserved.extents)} of {count} chunks"
            )
        stack.callback(client.abort, reserved.extents)
        segment = client.segment(int(reserved.extents["segment"][0]), reserved.lineage)
        borrow = None if segment is None else segment.borrow()
        if segment is None or borrow is None:
            raise RuntimeError(f"the segment on {holder} cannot be mapped with {reader}: see the log")
        stack.enter_context(borrow)
        offsets = [int(offset) for offset in reserved.extents["offset"]]
        subject = Subject(
            layout, [segment.view(at, layout.chunk_bytes) for at in offsets], torch_device(reader)
        )
        stack.callback(partial(_let_go, subject))
        yield subject


def _let_go(subject: Subject) -> None:
    """No view outlives its borrow, and no copy its memory."""
    finish(subject.device)
    subject.chunks.clear()
    subject.runs.clear()
