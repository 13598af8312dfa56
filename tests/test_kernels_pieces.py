"""Small chunks of whole pages: the fast way equals the definition, and is taken where it should be."""

from __future__ import annotations

import pytest
import torch

from vcache.kernels import PagedKV, gather_pages, pieces, reference, scatter_pages
from vcache.layout import KVLayout

PAGES, LAYERS = 23, 3


def paged_kv(page_bytes: int, per_chunk: int, seed: int = 0, padding: int = 0) -> PagedKV:
    """Random pages of bytes, perhaps with something between them."""
    draw = torch.Generator().manual_seed(seed)
    layout = KVLayout(
        num_layers=LAYERS,
        num_kv_heads=2,
        head_size=32,
        dtype="bfloat16",
        chunk_tokens=16 * per_chunk,
        form="pages",
        page_tokens=16,
        page_bytes=page_bytes,
        page_format="x",
    )
    whole = [
        torch.randint(0, 256, (PAGES, page_bytes + padding), dtype=torch.uint8, generator=draw)
        for _ in range(LAYERS)
    ]
    return PagedKV.from_tensors([tensor[:, :page_bytes] for tensor in whole], "pb", layout)


def chunks_of(paged: PagedKV, count: int) -> list[torch.Tensor]:
    """Chunks full of ones."""
    return [torch.ones(paged.layout.chunk_bytes, dtype=torch.uint8) for _ in range(count)]


@pytest.mark.parametrize("padding", [0, 64])
@pytest.mark.parametrize("per_chunk", [1, 2, 5])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("task_pages", [None, 1, 4])
def test_it_equals_the_definition(
    padding: int, per_chunk: int, holes: bool, task_pages: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if task_pages is not None:  # several threads, as for what is large
        monkeypatch.setattr(pieces, "_TASK_BYTES", task_pages * 4096 + 1)
        monkeypatch.setattr(pieces, "_THREAD_BYTES_MIN", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    paged = paged_kv(4096, per_chunk, padding=padding)
    assert pieces.fits(paged)
    pages = torch.randperm(PAGES, generator=torch.Generator().manual_seed(1))[: 4 * per_chunk]
    if holes:
        pages[::3] = -1
    got, wanted = chunks_of(paged, 4), chunks_of(paged, 4)
    gather_pages(paged, pages, got)
    reference.gather(paged, pages, wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    target, defined = paged_kv(4096, per_chunk, 50, padding), paged_kv(4096, per_chunk, 50, padding)
    scatter_pages(target, pages, got)
    reference.scatter(defined, pages, got)
    assert all(torch.equal(a, b) for a, b in zip(target.layers, defined.layers, strict=True))


def test_some_layers_only() -> None:
    paged, pages = paged_kv(4096, 2), torch.tensor([4, 9, 2, 7])
    got, wanted = chunks_of(paged, 2), chunks_of(paged, 2)
    gather_pages(paged, pages, got, range(1, 3))
    reference.gather(paged, pages, wanted, range(1, 3))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    target, defined = paged_kv(4096, 2, 50), paged_kv(4096, 2, 50)
    scatter_pages(target, pages, got, range(2, 3))
    reference.scatter(defined, pages, got, range(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(target.layers, defined.layers, strict=True))


def test_a_last_chunk_of_fewer_pages() -> None:
    paged = paged_kv(4096, 3)
    pages = torch.tensor([4, 9, 2, 7])
    sizes = [paged.layout.chunk_bytes, LAYERS * 4096]
    got = [torch.ones(size, dtype=torch.uint8) for size in sizes]
    wanted = [torch.ones(size, dtype=torch.uint8) for size in sizes]
    gather_pages(paged, pages, got)
    reference.gather(paged, pages, wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(("page_bytes", "per_chunk"), [(1024, 1), (4096, 65), (512 * 1024, 1)])
def test_tiny_pages_and_large_chunks_go_another_way(page_bytes: int, per_chunk: int) -> None:
    assert not pieces.fits(paged_kv(page_bytes, per_chunk))


def test_nothing_is_asked_for() -> None:
    paged = paged_kv(4096, 1)
    before = [layer.clone() for layer in paged.layers]
    scatter_pages(paged, torch.tensor([-1, -1]), chunks_of(paged, 2))
    assert all(torch.equal(a, b) for a, b in zip(paged.layers, before, strict=True))
