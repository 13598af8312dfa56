"""Gather and scatter: every layout, dtype and order, the fast path against the definition, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels_common import (
    CHUNK_TOKENS,
    DTYPES,
    LATENT_AXES,
    PAGE_TOKENS,
    PAGES,
    TOKEN_AXES,
    bits,
    chunks_for,
    latent_layout,
    paged_kv,
    same,
    tensors,
    token_layout,
)
from vcache.kernels import PagedKV, gather_pages, gather_tokens, reference, scatter_pages, scatter_tokens
from vcache.kernels.rows import PageRun, Rows, plan, tables_of
from vcache.layout import KVLayout

SLOTS = PAGES * PAGE_TOKENS


def shuffled(count: int, seed: int = 1) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def slots_in_pages(pages: Tensor, tokens: int) -> Tensor:
    return (pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten()[:tokens]


def with_holes(slots: Tensor, *positions: int) -> Tensor:
    slots = slots.clone()
    slots[list(positions)] = -1
    return slots


ORDERS = {
    "page order": slots_in_pages(torch.arange(3, 15), 3 * CHUNK_TOKENS),
    "random pages": slots_in_pages(shuffled(PAGES), 3 * CHUNK_TOKENS),
    "random slots": shuffled(SLOTS)[: 3 * CHUNK_TOKENS],
    "not at a page's start": torch.arange(5, 5 + 2 * CHUNK_TOKENS),
    "descending": torch.arange(SLOTS - 1, SLOTS - 1 - CHUNK_TOKENS, -1),
    "holes": with_holes(slots_in_pages(shuffled(PAGES), 2 * CHUNK_TOKENS), 0, 1, 2, 3, 17, 31),
    "only holes": torch.full((CHUNK_TOKENS,), -1),
    "a partial chunk in page order": slots_in_pages(torch.arange(8), CHUNK_TOKENS + 7),
    "a partial chunk at random": shuffled(SLOTS)[: CHUNK_TOKENS + 5],
    "one token": torch.tensor([SLOTS - 1]),
    "one page": slots_in_pages(torch.tensor([PAGES - 1]), PAGE_TOKENS),
    "all pages": torch.arange(SLOTS),
    "nothing": torch.empty(0, dtype=torch.int64),
}


def check_round_trip(axes: str, layout: KVLayout, slots: Tensor) -> None:
    """Gather equals the definition; so does scatter into other pages, and it changes nothing else."""
    source, target, defined = (paged_kv(axes, layout, seed) for seed in (0, 50, 50))
    before = bits(source)
    chunks, wanted = (chunks_for(source, len(slots)) for _ in range(2))
    gather_tokens(source, slots, chunks)
    reference.gather(source, slots, wanted)
    assert same(chunks, wanted)
    assert same(bits(source), before)
    scatter_tokens(target, slots, chunks)
    reference.scatter(defined, slots, wanted)
    assert same(bits(target), bits(defined))
    kept = slots[slots >= 0]
    again = chunks_for(source, len(kept))
    gather_tokens(target, kept, again)
    first = chunks_for(source, len(kept), seed=7)
    gather_tokens(source, kept, first)
    assert same(again, first)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("axes", TOKEN_AXES)
def test_layouts_round_trip(axes: str, order: str) -> None:
    check_round_trip(axes, token_layout(), ORDERS[order])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("axes", LATENT_AXES)
def test_latent_layouts_round_trip(axes: str, order: str) -> None:
    check_round_trip(axes, latent_layout(), ORDERS[order])


@pytest.mark.parametrize("order", ["page order", "random pages", "random slots", "holes"])
@pytest.mark.parametrize("axes", ["kpshd", "pkhsd", "phs(kd)"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_round_trip(dtype: str, axes: str, order: str) -> None:
    check_round_trip(axes, token_layout(dtype), ORDERS[order])


@pytest.mark.parametrize("axes", ["kpshd", "kphsd", "psh(kd)"])
def test_larger_copies_go_through_threads_and_page_runs(axes: str) -> None:
    layout = token_layout(num_layers=4, num_kv_heads=8, head_size=64, chunk_tokens=256)
    for pages in (torch.arange(64), shuffled(64), torch.cat([torch.arange(20, 64), torch.arange(20)])):
        slots = (pages[:, None] * 16 + torch.arange(16)).flatten()
        source = paged_kv(axes, layout, pages=64, page_tokens=16)
        target, defined = (paged_kv(axes, layout, 50, pages=64, page_tokens=16) for _ in range(2))
        chunks, wanted = (chunks_for(source, len(slots)) for _ in range(2))
        gather_tokens(source, slots, chunks)
        reference.gather(source, slots, wanted)
        assert same(chunks, wanted)
        scatter_tokens(target, slots, chunks)
        reference.scatter(defined, slots, wanted)
        assert same(bits(target), bits(defined))


def test_the_definition_element_by_element() -> None:
    """The order of a chunk's bytes, written out: [layer, K/V, token, head, head_size]."""
    layout = token_layout("uint8")
    kvcaches = tensors("pkhsd", layout)
    slots = shuffled(SLOTS)[:CHUNK_TOKENS]
    (chunk,) = chunks_for(paged_kv("pkhsd", layout), CHUNK_TOKENS)
    reference.gather(PagedKV.from_tensors(kvcaches, "pkhsd", layout), slots, [chunk])
    wanted = [
        kvcaches[layer][slot // PAGE_TOKENS, part, head, slot % PAGE_TOKENS].tolist()
        for layer in range(layout.num_layers)
        for part in range(2)
        for slot in slots.tolist()
        for head in range(layout.num_kv_heads)
    ]
    assert chunk.tolist() == [byte for row in wanted for byte in row]


def test_a_chunk_does_not_depend_on_the_pages_it_came_from() -> None:
    """Written from one layout and page size, read into another."""
    layout = token_layout()
    source = paged_kv("kpshd", layout)
    target = paged_kv("phs(kd)", layout, 50, pages=7, page_tokens=16)
    chunks, again = (chunks_for(source, 2 * CHUNK_TOKENS) for _ in range(2))
    gather_tokens(source, ORDERS["random slots"][: 2 * CHUNK_TOKENS], chunks)
    slots = torch.arange(40, 40 + 2 * CHUNK_TOKENS)
    scatter_tokens(target, slots, chunks)
    gather_tokens(target, slots, again)
    assert same(chunks, again)


def strided(kind: str, layout: KVLayout) -> list[Tensor]:
    """Paged tensors `kpshd` that are views into something larger, or of another order of memory."""
    made = []
    for index, plain in enumerate(tensors("kpshd", layout)):
        if kind == "padded slots":
            tensor = torch.zeros(*plain.shape[:-2], HEADS_PADDED, layout.head_size, dtype=plain.dtype)[
                ..., :2, :
            ]
        elif kind == "padded elements":
            tensor = torch.zeros(*plain.shape[:-1], layout.head_size + 1, dtype=plain.dtype)[..., :-1]
        elif kind == "strided elements":
            tensor = torch.zeros(*plain.shape[:-1], 2 * layout.head_size, dtype=plain.dtype)[..., ::2]
        elif kind == "odd address":
            size = plain.numel() * plain.element_size()
            tensor = torch.zeros(size + 2, dtype=torch.uint8)[2:].view(plain.dtype).view(plain.shape)
        elif kind == "layers of different strides":
            tensor = (
                torch.empty_like(plain) if index else torch.empty_like(plain.transpose(2, 3)).transpose(2, 3)
            )
            tensor = tensor if index else plain.transpose(2, 3).contiguous().transpose(2, 3)
        else:
            tensor = plain.transpose(0, 1).contiguous().transpose(0, 1)
        made.append(tensor.copy_(plain))
    return made


HEADS_PADDED = 3
STRIDED = [
    "padded slots",
    "padded elements",
    "strided elements",
    "odd address",
    "layers of different strides",
    "K/V second in memory",
]


@pytest.mark.parametrize("order", ["page order", "random pages", "holes"])
@pytest.mark.parametrize("kind", STRIDED)
def test_any_strides_will_do(kind: str, order: str) -> None:
    layout, slots = token_layout(), ORDERS[order]
    plain = paged_kv("kpshd", layout)
    views = PagedKV.from_tensors(strided(kind, layout), "kpshd", layout)
    chunks, wanted = (chunks_for(plain, len(slots)) for _ in range(2))
    gather_tokens(views, slots, chunks)
    reference.gather(plain, slots, wanted)
    assert same(chunks, wanted)
    other = chunks_for(plain, len(slots), seed=5)
    scatter_tokens(views, slots, other)
    reference.scatter(plain, slots, other)
    assert same(bits(views), bits(plain))


def test_chunks_at_odd_addresses() -> None:
    layout, slots = token_layout(), ORDERS["random pages"][:CHUNK_TOKENS]
    paged = paged_kv("kpshd", layout)
    chunk = torch.zeros(layout.chunk_bytes + 2, dtype=torch.uint8)[2:]
    (wanted,) = chunks_for(paged, CHUNK_TOKENS)
    gather_tokens(paged, slots, [chunk])
    reference.gather(paged, slots, [wanted])
    assert torch.equal(chunk, wanted)


def test_holes_become_zeros_and_are_skipped() -> None:
    paged = paged_kv("kpshd", token_layout("uint8"))
    slots = with_holes(torch.arange(CHUNK_TOKENS), 3)
    (chunk,) = chunks_for(paged, CHUNK_TOKENS)
    gather_tokens(paged, slots, [chunk])
    assert not chunk.view(paged.layout.num_layers, 2, CHUNK_TOKENS, -1)[:, :, 3].any()
    before = bits(paged)
    scatter_tokens(paged, slots, [torch.zeros_like(chunk)])
    for old, new in zip(before, paged.layers, strict=True):
        assert torch.equal(old[:, 0, 3], new[:, 0, 3])
        assert not new[:, 0, :3].any()


PAGE_AXES = ["kpshd", "pkshd", "kphsd", "pkhsd", "phs(kd)", "psd", "pb", "lpb", "plhs(kd)"]


def page_layout(axes: str, *, dtype: str = "bfloat16", folded: bool = False) -> tuple[KVLayout, list[Tensor]]:
    """A layout in the pages form and its paged tensors; `folded` counts all layers as one."""
    base = latent_layout(dtype) if axes == "psd" else token_layout(dtype)
    if axes.endswith("b"):
        shapes = [PAGES, 100] if axes == "pb" else [base.num_layers, PAGES, 100]
        kvcaches = [torch.randint(0, 256, shapes, dtype=torch.uint8) for _ in range(3 if axes == "pb" else 1)]
    else:
        kvcaches = tensors(axes, base)
    total = sum(tensor.numel() * tensor.element_size() for tensor in kvcaches) // PAGES
    layers = 1 if folded else base.num_layers
    layout = token_layout(
        dtype,
        num_layers=layers,
        form="pages",
        page_tokens=PAGE_TOKENS,
        page_bytes=total // layers,
        page_format="test",
    )
    return layout, kvcaches


PAGE_ORDERS = {
    "ascending": torch.arange(5, 5 + 8),
    "random": shuffled(PAGES)[:12],
    "none among them": torch.tensor([3, -1, 4, 5, -1, -1, 0, 23]),
    "a partial chunk": torch.tensor([1, 2, 3, 4, 9]),
    "one": torch.tensor([PAGES - 1]),
}


@pytest.mark.parametrize("order", PAGE_ORDERS)
@pytest.mark.parametrize("axes", PAGE_AXES)
def test_pages_round_trip_verbatim(axes: str, order: str) -> None:
    pages = PAGE_ORDERS[order]
    layout, kvcaches = page_layout(axes)
    source = PagedKV.from_tensors(kvcaches, axes, layout)
    copies = [torch.zeros_like(tensor) for tensor in kvcaches]
    target = PagedKV.from_tensors(copies, axes, layout)
    chunks, wanted = (chunks_for(source, len(pages) * PAGE_TOKENS) for _ in range(2))
    gather_pages(source, pages, chunks)
    reference.gather(source, pages, wanted)
    assert same(chunks, wanted)
    scatter_pages(target, pages, chunks)
    for page in range(PAGES):
        for moved, plain in zip(target.layers, source.layers, strict=True):
            assert torch.equal(moved[page], plain[page]) if page in pages else not moved[page].any()


def test_a_page_of_all_layers_is_one_copy() -> None:
    layout, (tensor,) = page_layout("plhs(kd)", folded=True)
    paged = PagedKV.from_tensors(tensor, "plhs(kd)", layout)
    assert paged.page_axes == "lhs(kd)"
    (chunk,) = chunks_for(paged, CHUNK_TOKENS)
    gather_pages(paged, torch.tensor([2, 3, 4, 5]), [chunk])
    assert torch.equal(chunk, tensor[2:6].flatten().view(torch.uint8))


def test_pages_are_in_the_order_of_memory() -> None:
    layout, _ = page_layout("pkhsd")
    plain = tensors("pkhsd", token_layout())
    as_nhd = [tensor.transpose(2, 3) for tensor in plain]  # logically NHD, HND in memory
    assert PagedKV.from_tensors(plain, "pkhsd", layout).page_axes == "khsd"
    assert PagedKV.from_tensors(as_nhd, "pkshd", layout).page_axes == "khsd"


@given(
    axes=st.sampled_from(TOKEN_AXES),
    dtype=st.sampled_from(DTYPES),
    page_tokens=st.integers(1, 9),
    chunk_tokens=st.integers(1, 17),
    heads=st.integers(1, 3),
    head_size=st.integers(1, 24),
    choice=st.lists(st.integers(-1, 35), max_size=40, unique=True),
)
@settings(max_examples=150)
def test_any_sizes_and_slots(
    axes: str, dtype: str, page_tokens: int, chunk_tokens: int, heads: int, head_size: int, choice: list[int]
) -> None:
    layout = token_layout(
        dtype, num_layers=2, num_kv_heads=heads, head_size=head_size, chunk_tokens=chunk_tokens
    )
    sizes = {"pages": -(-36 // page_tokens), "page_tokens": page_tokens}
    slots = torch.tensor(choice, dtype=torch.int64)
    source, target, defined = (paged_kv(axes, layout, seed, **sizes) for seed in (0, 50, 50))
    chunks, wanted = (chunks_for(source, len(slots)) for _ in range(2))
    gather_tokens(source, slots, chunks)
    reference.gather(source, slots, wanted)
    assert same(chunks, wanted)
    scatter_tokens(target, slots, chunks)
    reference.scatter(defined, slots, wanted)
    assert same(bits(target), bits(defined))


def test_plans_take_the_largest_pieces() -> None:
    """Runs of whole pages where pages ascend, pages as rows where they do not, tokens for the rest."""
    layout = token_layout(num_kv_heads=8, head_size=64, chunk_tokens=256)
    tables = tables_of(paged_kv("kpshd", layout, pages=32, page_tokens=16))
    assert tables is not None
    runs = plan(tables, torch.arange(16, 16 + 256).numpy())
    assert runs == [PageRun(begin=0, page=1, count=16)]
    random = (shuffled(32)[:16, None] * 16 + torch.arange(16)).flatten()
    (pages,) = plan(tables, random.numpy())
    assert isinstance(pages, Rows)
    assert pages.words == 16 * 8 * 64 * 2 // 8
    run, rest = plan(tables, torch.arange(250).numpy())
    assert isinstance(run, PageRun)
    assert isinstance(rest, Rows)
    assert (rest.begin, rest.end, rest.words) == (240, 250, 8 * 64 * 2 // 8)


@pytest.mark.parametrize("kind", ["strided elements", "layers of different strides"])
def test_what_has_no_rows_goes_to_the_reference(kind: str) -> None:
    layout = token_layout()
    assert tables_of(PagedKV.from_tensors(strided(kind, layout), "kpshd", layout)) is None
