"""The engine against a real server: what one process stores another one loads byte for byte, or misses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.processes.content import LAYOUT, PAGE_TOKENS, PagedPrompt, kv_of, prompt
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S, Worker
from tests.support.engines import CHUNK, KEYS, counted, load, make, store
from vcache.engine import Location, VCacheEngine
from vcache.layout import KVLayout


@pytest.fixture(scope="module")
def peer(pool: Pool) -> Worker:
    """An engine in another process, whose segment is on another device."""
    return pool.engine(device="shm:1", size="4MiB")


# -- between processes


def test_what_one_process_stores_another_one_loads(engine: VCacheEngine, peer: Worker) -> None:
    count = 5 * CHUNK + 3
    assert peer.call("lookup", 1, count) == 0
    store(engine, 1, count)
    assert peer.call("lookup", 1, count) == 5 * CHUNK
    assert peer.call("retrieve", 1, count) == (5 * CHUNK, 0)
    stats = peer.call("stats")
    assert (stats["hits"], stats["misses"], stats["retrieved_tokens"]) == (5, 0, 5 * CHUNK)
    assert stats["retrieved_bytes"] == 5 * LAYOUT.chunk_bytes


def test_it_works_in_the_other_direction_and_both_ways_at_once(engine: VCacheEngine, peer: Worker) -> None:
    peer.send("store", 2, 8 * CHUNK)
    store(engine, 3, 8 * CHUNK)
    peer.result()
    peer.send("retrieve", 3, 8 * CHUNK)
    assert load(engine, 2, 8 * CHUNK) == [True] * 8 * CHUNK
    assert peer.result() == (8 * CHUNK, 0)


def test_each_engine_stores_into_its_own_segment_first(
    pool: Pool, engine: VCacheEngine, peer: Worker
) -> None:
    store(engine, 4, CHUNK)
    peer.call("store", 5, CHUNK)
    rows = {row.key: row.segment for row in all_rows(pool)}
    assert rows[KEYS.keys(prompt(4, CHUNK), CHUNK)[0]] == counted(engine, "own_segment")[0]
    assert rows[KEYS.keys(prompt(5, CHUNK), CHUNK)[0]] == peer.call("stats")["own_segment"]


def all_rows(pool: Pool) -> list[Any]:
    rows, cursor = [], 0
    while True:
        page = pool.observer.list(cursor)
        rows += page.rows
        cursor = page.cursor
        if not cursor:
            return rows


def test_an_engine_without_a_segment_stores_into_that_of_its_device(
    pool: Pool, engine: VCacheEngine, peer: Worker
) -> None:
    with make(pool, device="shm:1") as borrower:
        store(borrower, 6, 2 * CHUNK)
    rows = {row.key: row.segment for row in all_rows(pool)}
    own = peer.call("stats")["own_segment"]
    assert [rows[key] for key in KEYS.keys(prompt(6, 2 * CHUNK), CHUNK)] == [own, own]


# -- masks, slots, parts


def test_a_mask_leaves_its_prefix_alone(engine: VCacheEngine) -> None:
    count = 4 * CHUNK + 1
    store(engine, 10, count)
    mask = torch.ones(count, dtype=torch.bool)
    mask[: 2 * CHUNK] = False
    paged = PagedPrompt(10, count)
    loaded = engine.retrieve(paged.tokens, mask, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
    assert loaded.tolist() == [False] * 2 * CHUNK + [True] * 2 * CHUNK + [False]
    assert paged.wrong_tokens(loaded) == 0
    assert paged.wrong_tokens(~loaded) == count - 2 * CHUNK


def test_an_offset_stores_only_what_is_behind_it(engine: VCacheEngine) -> None:
    store(engine, 11, 4 * CHUNK, offset=2 * CHUNK)
    assert engine.lookup(prompt(11, 4 * CHUNK)) == 0
    mask = [False] * 2 * CHUNK + [True] * 2 * CHUNK
    assert load(engine, 11, 4 * CHUNK, mask) == mask
    store(engine, 11, 2 * CHUNK)
    assert engine.lookup(prompt(11, 4 * CHUNK)) == 4 * CHUNK


def test_a_mask_of_all_tokens_is_nothing_to_do(engine: VCacheEngine) -> None:
    store(engine, 12, 2 * CHUNK, mask=[False] * 2 * CHUNK)
    assert engine.lookup(prompt(12, 2 * CHUNK)) == 0
    assert load(engine, 12, 2 * CHUNK, [False] * 2 * CHUNK) == [False] * 2 * CHUNK


def test_fewer_tokens_than_a_chunk_are_no_chunk(engine: VCacheEngine) -> None:
    store(engine, 13, CHUNK - 1)
    assert engine.lookup(prompt(13, CHUNK - 1)) == 0
    assert load(engine, 13, CHUNK - 1) == [False] * (CHUNK - 1)


def test_tokens_without_a_slot_are_not_written(engine: VCacheEngine) -> None:
    store(engine, 14, 2 * CHUNK)
    paged = PagedPrompt(14, 2 * CHUNK)
    before = [tensor.clone() for tensor in paged.kvcaches]
    slots = paged.slots.clone()
    slots[[3, CHUNK + 5]] = -1
    loaded = engine.retrieve(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=slots)
    assert [at for at, there in enumerate(loaded.tolist()) if not there] == [3, CHUNK + 5]
    assert paged.wrong_tokens(loaded) == 0
    for was, now in zip(before, paged.kvcaches, strict=True):
        for slot in (paged.slots[3], paged.slots[CHUNK + 5]):
            assert torch.equal(was.flatten(1, 2)[:, slot], now.flatten(1, 2)[:, slot])


def test_a_chunk_with_a_token_without_a_slot_is_not_stored(engine: VCacheEngine) -> None:
    paged = PagedPrompt(15, 3 * CHUNK).fill()
    slots = paged.slots.clone()
    slots[CHUNK] = -1
    engine.store(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=slots)
    keys = KEYS.keys(paged.tokens, CHUNK)
    assert [engine.contains(key) for key in keys] == [Location.POOL, Location.NOWHERE, Location.POOL]
    assert load(engine, 15, 3 * CHUNK) == [True] * CHUNK + [False] * 2 * CHUNK


def test_a_partial_chunk_is_stored_only_when_asked_for(pool: Pool) -> None:
    count = 2 * CHUNK + 5
    with make(pool, model="partial", engine={"store_partial_chunks": True}) as engine:
        store(engine, 16, count)
        assert engine.lookup(prompt(16, count)) == count
        assert load(engine, 16, count) == [True] * count
        assert engine.lookup(prompt(16, count + 1)) == 2 * CHUNK
        assert counted(engine, "stored_tokens", "stored_bytes") == [
            count,
            LAYOUT.bytes_for(5) + 2 * LAYOUT.chunk_bytes,
        ]
    with make(pool, model="partial") as whole_only:
        assert whole_only.lookup(prompt(16, count)) == 2 * CHUNK


def test_a_second_store_copies_nothing(engine: VCacheEngine) -> None:
    store(engine, 17, 3 * CHUNK)
    before = counted(engine, "stored_chunks", "present_chunks")
    store(engine, 17, 3 * CHUNK)
    assert counted(engine, "stored_chunks", "present_chunks") == [before[0], before[1] + 3]


@pytest.mark.parametrize(
    "given", [{"model": "other"}, {"rank": 1}, {"cache_salt": "tenant"}, {"lora": "adapter"}]
)
def test_others_do_not_see_it(pool: Pool, engine: VCacheEngine, given: dict[str, Any]) -> None:
    store(engine, 18, CHUNK)
    with make(pool, **given) as other:
        assert other.lookup(prompt(18, CHUNK)) == 0


@pytest.mark.parametrize("kind", [list, np.array, lambda ids: np.array(ids, np.uint32), torch.tensor])
def test_tokens_may_come_in_any_integer_form(engine: VCacheEngine, kind: Any) -> None:
    store(engine, 19, CHUNK)
    assert engine.lookup(kind(prompt(19, CHUNK))) == CHUNK


# -- layouts of the reader and the writer

READERS = {
    "kpshd": lambda k, p, s, h, d: torch.zeros(k, p, s, h, d),
    "pkshd": lambda k, p, s, h, d: torch.zeros(p, k, s, h, d),
    "kphsd": lambda k, p, s, h, d: torch.zeros(k, p, h, s, d),
    "phs(kd)": lambda k, p, s, h, d: torch.zeros(p, h, s, k * d),
}


@pytest.mark.parametrize("axes", READERS)
def test_a_reader_with_other_paged_kv_loads_the_same_numbers(
    pool: Pool, engine: VCacheEngine, axes: str
) -> None:
    count = 3 * CHUNK
    store(engine, 20, count)
    tensors = [READERS[axes](2, count, 1, 2, 8) for _ in range(LAYOUT.num_layers)]
    with make(pool, kv_axes=axes) as reader:
        loaded = reader.retrieve(prompt(20, count), kvcaches=tensors, slot_mapping=torch.arange(count))
    assert loaded.all()
    expected = kv_of(20, count)
    for layer, tensor in enumerate(tensors):
        words = tensor.view(torch.int32)
        if axes == "phs(kd)":
            found = words.view(*words.shape[:3], 2, 8).permute(3, 0, 2, 1, 4)
        else:
            found = words.permute(*(axes.index(letter) for letter in "kpshd"))
        assert torch.equal(found.flatten(1, 2), expected[layer])


def test_pages_are_moved_verbatim(pool: Pool) -> None:
    layout = KVLayout(
        num_layers=3,
        num_kv_heads=2,
        head_size=8,
        dtype="bfloat16",
        chunk_tokens=16,
        form="pages",
        page_tokens=PAGE_TOKENS,
        page_bytes=2 * PAGE_TOKENS * 2 * 8 * 2,
        page_format="test",
    )
    keys = [bytes([number]) * 32 for number in range(1, 5)]
    generator = torch.Generator().manual_seed(0)
    written = [
        torch.randint(-(1 << 15), 1 << 15, (20, 512 // 2), dtype=torch.int16, generator=generator)
        for _ in range(3)
    ]
    written = [tensor.view(torch.bfloat16).view(20, 2, PAGE_TOKENS, 2, 8) for tensor in written]
    read = [torch.zeros_like(tensor) for tensor in written]
    source, target = [3, 1, 19, 0, 7, 8, -1, 2], [0, 1, 2, 3, 4, -1, 6, 7]
    with make(pool, layout=layout, kv_axes="pkshd") as engine:
        assert engine.store_pages(keys, kvcaches=written, pages=source) == 3
        assert engine.lookup_pages(keys) == 3
        assert engine.store_pages_async(keys[:3], kvcaches=written, pages=source[:6]).result(DEADLINE_S) == 3
        assert engine.retrieve_pages(keys, kvcaches=read, pages=target) == 3
        assert engine.retrieve_pages_async(keys, kvcaches=read, pages=target).result(DEADLINE_S) == 3
    for before, after in zip(written, read, strict=True):
        for page, from_page in zip(target[:5], source[:5], strict=True):
            assert torch.equal(before[from_page].view(torch.int16), after[page].view(torch.int16))
        assert not after[5:].any()


@pytest.mark.parametrize(
    "given", [{"model": "other"}, {"rank": 1}, {"cache_salt": "tenant"}, {"lora": "adapter"}]
)
def test_an_engines_own_keys_are_bound_to_model_rank_tenant_and_adapter(
    pool: Pool, given: dict[str, Any]
) -> None:
    """A block hash says which tokens, not whose KV: equal keys of other engines must miss."""
    layout = KVLayout(
        num_layers=1,
        num_kv_heads=1,
        head_size=8,
        dtype="float32",
        chunk_tokens=4,
        form="pages",
        page_tokens=4,
        page_bytes=2 * 4 * 8 * 4,
        page_format="test",
    )
    keys, pages = [b"k" * 32], [torch.randn(2, 2, 4, 1, 8)]
    with make(pool, layout=layout, kv_axes="pkshd") as engine:
        assert engine.store_pages(keys, kvcaches=pages, pages=[1]) == 1
        assert engine.contains(keys[0]) is Location.POOL
        with make(pool, layout=layout, kv_axes="pkshd", **given) as other:
            assert other.lookup_pages(keys) == 0
            assert other.retrieve_pages(keys, kvcaches=[torch.zeros(2, 2, 4, 1, 8)], pages=[0]) == 0
            assert other.contains(keys[0]) is Location.NOWHERE
            assert other.store_pages(keys, kvcaches=pages, pages=[0]) == 1
