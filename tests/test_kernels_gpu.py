"""The GPU's gather and scatter, under Triton's interpreter: bit for bit equal to the definition.

What a GPU would run is compiled, too: its accesses must be 16 bytes wide.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels_common import (
    CHUNK_TOKENS,
    DTYPES,
    LATENT_AXES,
    LAYERS,
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
from tests.test_kernels import ORDERS, PAGE_AXES, PAGE_ORDERS, STRIDED, page_layout, shuffled, strided
from vcache.errors import ArgumentError
from vcache.kernels import LaunchOptions, PagedKV, copy_engine, reference
from vcache.kernels.planes import planes_of
from vcache.layout import KVLayout

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels run on a GPU now: see tests/gpu", allow_module_level=True)

from vcache.kernels import gpu  # Triton reads TRITON_INTERPRET when it is imported


def check(
    source: PagedKV,
    target: PagedKV,
    defined: PagedKV,
    ids: torch.Tensor,
    tokens: int,
    layers: range | None = None,
    options: LaunchOptions | None = None,
) -> None:
    """Gather and scatter equal the definition and change nothing else. target, defined: equal so far."""
    options = options or LaunchOptions()
    before = bits(source)
    chunks, wanted = (chunks_for(source, tokens) for _ in range(2))
    gpu.gather(source, ids, chunks, layers, options)
    reference.gather(source, ids, wanted, layers)
    assert same(chunks, wanted)
    assert same(bits(source), before)
    gpu.scatter(target, ids, chunks, layers, options)
    reference.scatter(defined, ids, wanted, layers)
    assert same(bits(target), bits(defined))


def check_tokens(axes: str, layout: KVLayout, slots: torch.Tensor, layers: range | None = None) -> None:
    source, target, defined = (paged_kv(axes, layout, seed) for seed in (0, 50, 50))
    check(source, target, defined, slots, len(slots), layers)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("axes", TOKEN_AXES)
def test_layouts_round_trip(axes: str, order: str) -> None:
    check_tokens(axes, token_layout(), ORDERS[order])


@pytest.mark.parametrize("order", ["page order", "random slots", "holes", "a partial chunk at random"])
@pytest.mark.parametrize("axes", LATENT_AXES)
def test_latent_layouts_round_trip(axes: str, order: str) -> None:
    check_tokens(axes, latent_layout(), ORDERS[order])


@pytest.mark.parametrize("axes", ["kpshd", "phs(kd)"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_round_trip(dtype: str, axes: str) -> None:
    check_tokens(axes, token_layout(dtype), ORDERS["holes"])


@pytest.mark.parametrize("order", PAGE_ORDERS)
@pytest.mark.parametrize("axes", PAGE_AXES)
def test_pages_round_trip_verbatim(axes: str, order: str) -> None:
    layout, kvcaches = page_layout(axes)
    source = PagedKV.from_tensors(kvcaches, axes, layout)
    targets = [PagedKV.from_tensors([t.clone() for t in kvcaches], axes, layout) for _ in range(2)]
    pages = PAGE_ORDERS[order]
    check(source, targets[0], targets[1], pages.flip(0), len(pages) * PAGE_TOKENS)


@pytest.mark.parametrize("kind", STRIDED)
def test_any_strides_will_do(kind: str) -> None:
    layout, slots = token_layout(), ORDERS["holes"]
    plain = paged_kv("kpshd", layout)
    views = PagedKV.from_tensors(strided(kind, layout), "kpshd", layout)
    chunks, wanted = (chunks_for(plain, len(slots)) for _ in range(2))
    gpu.gather(views, slots, chunks)
    reference.gather(plain, slots, wanted)
    assert same(chunks, wanted)
    other = chunks_for(plain, len(slots), seed=5)
    gpu.scatter(views, slots, other)
    reference.scatter(plain, slots, other)
    assert same(bits(views), bits(plain))


@pytest.mark.parametrize("shift", [1, 2, 4, 8])
def test_chunks_at_odd_addresses_take_narrower_accesses(shift: int) -> None:
    layout, slots = token_layout("uint8"), ORDERS["random pages"][:CHUNK_TOKENS]
    paged = paged_kv("kpshd", layout)
    chunk = torch.zeros(layout.chunk_bytes + shift, dtype=torch.uint8)[shift:]
    planes = planes_of(paged, shift)
    assert planes is not None
    assert (planes.word, planes.align) == (shift, shift)
    (wanted,) = chunks_for(paged, CHUNK_TOKENS)
    gpu.gather(paged, slots, [chunk])
    reference.gather(paged, slots, [wanted])
    assert torch.equal(chunk, wanted)


@pytest.mark.parametrize("layers", [range(1), range(1, 2), range(1, LAYERS), range(LAYERS)])
@pytest.mark.parametrize("axes", ["kpshd", "lpkhsd"])
def test_some_layers_only(axes: str, layers: range) -> None:
    check_tokens(axes, token_layout(), ORDERS["a partial chunk at random"], layers)


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_a_limit_of_multiprocessors_changes_nothing_but_the_programs(limit: int) -> None:
    layout = token_layout(num_kv_heads=4, head_size=64, chunk_tokens=64)
    source, target, defined = (
        paged_kv("kpshd", layout, seed, pages=40, page_tokens=16) for seed in (0, 50, 50)
    )
    slots = shuffled(640)[:600]
    check(source, target, defined, slots, len(slots), options=LaunchOptions(sm_limit=limit))


def test_more_chunks_than_programs_and_more_than_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = token_layout(chunk_tokens=4)
    source, target, defined = (paged_kv("phs(kd)", layout, seed) for seed in (0, 50, 50))
    slots = shuffled(PAGES * PAGE_TOKENS)[:91]
    check(source, target, defined, slots, len(slots))
    monkeypatch.setattr(gpu, "_PLANE_WORDS_MAX", 100)
    check(source, target, defined, slots, len(slots))


def test_nothing_to_copy() -> None:
    paged = paged_kv("kpshd", token_layout())
    before = bits(paged)
    gpu.scatter(paged, torch.empty(0, dtype=torch.int64), [])
    gpu.prepare(paged)
    assert same(bits(paged), before)


@pytest.mark.parametrize("limit", [-1, 1.5, True, "8"])
def test_a_wrong_limit_is_refused(limit: object) -> None:
    with pytest.raises(ArgumentError, match="sm_limit"):
        LaunchOptions(sm_limit=limit)  # type: ignore[arg-type]  # that is the test


@given(
    axes=st.sampled_from(TOKEN_AXES),
    dtype=st.sampled_from(DTYPES),
    page_tokens=st.integers(1, 9),
    chunk_tokens=st.integers(1, 17),
    heads=st.integers(1, 3),
    head_size=st.integers(1, 24),
    choice=st.lists(st.integers(-1, 35), max_size=40, unique=True),
    first=st.integers(0, 1),
    limit=st.integers(0, 2),
)
@settings(max_examples=100, deadline=None)
def test_any_sizes_and_slots(
    axes: str,
    dtype: str,
    page_tokens: int,
    chunk_tokens: int,
    heads: int,
    head_size: int,
    choice: list[int],
    first: int,
    limit: int,
) -> None:
    layout = token_layout(
        dtype, num_layers=2, num_kv_heads=heads, head_size=head_size, chunk_tokens=chunk_tokens
    )
    sizes = {"pages": -(-36 // page_tokens), "page_tokens": page_tokens}
    source, target, defined = (paged_kv(axes, layout, seed, **sizes) for seed in (0, 50, 50))
    slots = torch.tensor(choice, dtype=torch.int64)
    check(source, target, defined, slots, len(slots), range(first, 2), LaunchOptions(sm_limit=limit))


# -- the copy engine's pieces


def copied_by_pieces(paged: PagedKV, ids: torch.Tensor, chunks: list[torch.Tensor], layers: range) -> int:
    """Gather with the pieces that the copy engine would be given, in host memory; how many there were."""
    planes = planes_of(paged)
    assert planes is not None
    count = 0
    for in_paged, in_chunk, length in copy_engine.pieces(planes, ids, chunks, layers):
        count += 1
        if in_paged is None:
            ctypes.memset(in_chunk, 0, length)
        else:
            ctypes.memmove(in_chunk, in_paged, length)
    return count


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("axes", ["kpshd", "pkshd", "psd"])
def test_the_copy_engines_pieces_are_the_same_bytes(axes: str, order: str) -> None:
    layout = latent_layout() if axes == "psd" else token_layout()
    paged, slots = paged_kv(axes, layout), ORDERS[order]
    chunks, wanted = (chunks_for(paged, len(slots)) for _ in range(2))
    layers = range(1, LAYERS)
    copied_by_pieces(paged, slots, chunks, layers)
    reference.gather(paged, slots, wanted, layers)
    assert same(chunks, wanted)


def test_consecutive_pages_are_one_piece() -> None:
    paged = paged_kv("kpshd", token_layout())
    chunks = chunks_for(paged, CHUNK_TOKENS)
    assert copied_by_pieces(paged, torch.arange(8, 8 + CHUNK_TOKENS), chunks, range(LAYERS)) == 2 * LAYERS


def test_without_cupy_the_kernel_copies_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    planes = planes_of(paged_kv("kpshd", token_layout()))
    assert planes is not None
    monkeypatch.setattr(copy_engine, "PIECE_BYTES_MIN", 1)
    monkeypatch.setattr(copy_engine, "_has_cupy", lambda: False)
    assert not copy_engine.is_faster(planes, torch.arange(16))


def test_the_copy_engine_is_for_long_pieces_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_engine, "_has_cupy", lambda: True)
    paged = paged_kv("kpshd", token_layout())
    planes = planes_of(paged)
    assert planes is not None
    row = planes.unit_words * planes.word
    monkeypatch.setattr(copy_engine, "PIECE_BYTES_MIN", 16 * row)
    assert copy_engine.is_faster(planes, torch.arange(16))
    assert not copy_engine.is_faster(planes, torch.arange(15))
    assert not copy_engine.is_faster(planes, shuffled(32))
    by_heads = planes_of(paged_kv("kphsd", token_layout()))
    assert by_heads is not None
    assert not copy_engine.is_faster(by_heads, torch.arange(64))


# -- what a GPU would run


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled_for_a_gpu_every_access_is_16_bytes_wide(capability: int) -> None:
    """Compiled to machine code, which needs no GPU: no narrow access to KV, no spilled register."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, "-W", "ignore", "-m", "tests.support.compiled_kernel", str(capability)]
    root = Path(__file__).parents[1]
    ran = subprocess.run(script, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 12
    assert all(line.endswith("wide=8+8 narrow_stores=0 spilled=0") for line in lines), ran.stdout


def test_the_tables_of_one_copy_travel_together() -> None:
    paged = paged_kv("kpshd", token_layout())
    chunks = chunks_for(paged, 2 * CHUNK_TOKENS)
    ids, addresses = gpu._tables(torch.device("cpu"), torch.arange(2 * CHUNK_TOKENS), chunks)
    assert ids.untyped_storage().data_ptr() == addresses.untyped_storage().data_ptr()
    assert ids.tolist() == list(range(2 * CHUNK_TOKENS))
    assert addresses.tolist() == [chunk.data_ptr() for chunk in chunks]


@pytest.mark.parametrize("tokens", [1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS + 3])
def test_the_tables_are_aligned_as_the_kernel_was_compiled_for(tokens: int) -> None:
    """Or Triton would compile another one, in the middle of a request."""
    paged = paged_kv("kpshd", token_layout())
    for table in gpu._tables(torch.device("cpu"), torch.arange(tokens), chunks_for(paged, tokens)):
        assert table.data_ptr() % 16 == 0


def test_described_once_for_each_alignment() -> None:
    paged = PagedKV.from_tensors(tensors("kpshd", token_layout()), "kpshd", token_layout())
    gpu.prepare(paged)
    described = gpu._describe(paged, 16)
    assert described is gpu._describe(paged, 16)
    assert described is not gpu._describe(paged, 8)
