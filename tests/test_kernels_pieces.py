"""Small chunks of whole pages: the fast way equals the definition, and is taken where it should be."""

from __future__ import annotations

import pytest
import torch

from vcache.kernels import PagedKV, even_runs, gather_pages, pieces, reference, scatter_pages
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


PLACES = {
    "each by itself": None,
    "one behind the other": [0, 1, 2, 3],
    "backwards": [3, 2, 1, 0],
    "every second, in any order": [4, 0, 6, 2],
    "at no equal distances": [5, 0, 1, 3],
    "two and two": [0, 1, 6, 7],
}


def chunks_of(
    paged: PagedKV, count: int, where: str = "each by itself", shift: int = 0
) -> list[torch.Tensor]:
    """Chunks full of ones. where: how they lie in one memory. shift: of all, in bytes."""
    size, places = paged.layout.chunk_bytes, PLACES[where]
    if places is None:
        return [torch.ones(size, dtype=torch.uint8) for _ in range(count)]
    memory = torch.ones(shift + 8 * size, dtype=torch.uint8)[shift:]
    return [memory[place * size : (place + 1) * size] for place in places[:count]]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("padding", [0, 64])
@pytest.mark.parametrize("per_chunk", [1, 2, 5])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("task_pages", [None, 1, 4])
def test_it_equals_the_definition(
    where: str,
    padding: int,
    per_chunk: int,
    holes: bool,
    task_pages: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if task_pages is not None:  # several threads, as for what is large
        monkeypatch.setattr(pieces, "_TASK_BYTES", task_pages * 4096 + 1)
        monkeypatch.setattr(pieces, "_THREAD_BYTES_MIN", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(even_runs, "_RUN_PAGES_MIN", 2)
    paged = paged_kv(4096, per_chunk, padding=padding)
    assert pieces.fits(paged)
    pages = torch.randperm(PAGES, generator=torch.Generator().manual_seed(1))[: 4 * per_chunk]
    if holes:
        pages[::3] = -1
    got, wanted = chunks_of(paged, 4, where), chunks_of(paged, 4)
    gather_pages(paged, pages, got)
    reference.gather(paged, pages, wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    target, defined = paged_kv(4096, per_chunk, 50, padding), paged_kv(4096, per_chunk, 50, padding)
    scatter_pages(target, pages, got)
    reference.scatter(defined, pages, got)
    assert all(torch.equal(a, b) for a, b in zip(target.layers, defined.layers, strict=True))


@pytest.mark.parametrize("shift", [0, 1, 4])
@pytest.mark.parametrize(
    ("where", "runs"),
    [
        ("one behind the other", [[0, 1, 2, 3]]),
        ("backwards", [[3, 2, 1, 0]]),
        ("every second, in any order", [[1, 3, 0, 2]]),
        ("at no equal distances", [[1, 2], [3, 0]]),
        ("two and two", [[0, 1], [2, 3]]),
    ],
)
def test_chunks_at_equal_distances_are_one_run(where: str, runs: list[list[int]], shift: int) -> None:
    paged = paged_kv(4096, 4)
    pages = torch.randperm(PAGES)[:16].numpy()
    found = even_runs.even_runs(paged, pages, chunks_of(paged, 4, where, shift))
    assert [run.members for run in found] == runs


def test_a_run_through_several_memories() -> None:
    paged, target, defined = paged_kv(4096, 4), paged_kv(4096, 4, 50), paged_kv(4096, 4, 50)
    pages = torch.randperm(PAGES)[:16]
    size = paged.layout.chunk_bytes
    first, second = torch.empty(3 * size, dtype=torch.uint8), torch.empty(3 * size, dtype=torch.uint8)
    low, high = sorted((first, second), key=torch.Tensor.data_ptr)
    apart = high.data_ptr() - low.data_ptr()
    chunks = [low[:size], high[:size]]
    reference.gather(paged, pages[:8], chunks)
    [run] = even_runs.even_runs(paged, pages[:8].numpy(), chunks)
    assert (run.members, run.distance) == ([0, 1], apart)
    pieces.scatter(target, pages[:8], chunks)
    reference.scatter(defined, pages[:8], chunks)
    assert all(torch.equal(a, b) for a, b in zip(target.layers, defined.layers, strict=True))


def test_a_run_of_odd_addresses() -> None:
    paged, target, defined = paged_kv(4096, 4), paged_kv(4096, 4, 50), paged_kv(4096, 4, 50)
    pages = torch.randperm(PAGES)[:16]
    chunks = chunks_of(paged, 4, "one behind the other", shift=1)
    wanted = chunks_of(paged, 4)
    reference.gather(paged, pages, wanted)
    for chunk, content in zip(chunks, wanted, strict=True):
        chunk.copy_(content)
    pieces.scatter(target, pages, chunks)
    reference.scatter(defined, pages, wanted)
    assert all(torch.equal(a, b) for a, b in zip(target.layers, defined.layers, strict=True))


@pytest.mark.parametrize("where", ["each by itself", "one behind the other"])
def test_some_layers_only(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paged, pages = paged_kv(4096, 2), torch.tensor([4, 9, 2, 7])
    monkeypatch.setattr(even_runs, "_RUN_PAGES_MIN", 2)
    got, wanted = chunks_of(paged, 2, where), chunks_of(paged, 2)
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
