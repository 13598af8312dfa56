"""The engine against a real server: what one process stores another one loads byte for byte, or misses."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.processes.content import AXES, LAYOUT, PAGE_TOKENS, PagedPrompt, kv_of, prompt
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S, Worker
from vcache.engine import Location, VCacheEngine
from vcache.engine.handles import Gate, Operations
from vcache.errors import EngineClosed
from vcache.keys import KeyChain
from vcache.layout import KVLayout
from vcache.limits import ASYNC_OPERATIONS_MAX
from vcache.tiers import MemoryTier

CHUNK = LAYOUT.chunk_tokens
KEYS = KeyChain(LAYOUT.fingerprint, "test-model")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool() as running:
        running.start_server()
        yield running
        running.check()


@pytest.fixture(scope="module")
def peer(pool: Pool) -> Worker:
    """An engine in another process, whose segment is on another device."""
    return pool.engine(device="shm:1", size="4MiB")


@pytest.fixture(scope="module")
def engine(pool: Pool) -> Iterator[VCacheEngine]:
    with make(pool, size="16MiB") as made:
        yield made


def make(pool: Pool, *, size: int | str = 0, layout: KVLayout = LAYOUT, **given: Any) -> VCacheEngine:
    options: dict[str, Any] = {
        "model": "test-model",
        "kv_axes": AXES,
        "device": "shm:0",
        "segment.size": size,
    }
    options["tiers.prefetch"] = False  # so that it is the retrieve that reads below, and the counters say so
    made = VCacheEngine(layout=layout, **{**pool.client_config(), **options, **given})
    assert made.wait_connected(DEADLINE_S) or not pool.path.exists()
    return made


def store(engine: VCacheEngine, seed: int, count: int, **given: Any) -> None:
    paged = PagedPrompt(seed, count).fill()
    engine.store(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots, **given)


def load(engine: VCacheEngine, seed: int, count: int, mask: Any = None) -> list[bool]:
    """Retrieve a prompt and check every byte of it; of each token, whether it was loaded."""
    paged = PagedPrompt(seed, count)
    loaded = engine.retrieve(paged.tokens, mask, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
    assert loaded.dtype == torch.bool
    assert paged.wrong_tokens(loaded) == 0
    return list(loaded.tolist())


def counted(engine: VCacheEngine, *names: str) -> list[int]:
    stats = engine.get_stats()
    return [int(stats[name]) for name in names]


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


# -- in the background


def test_handles_are_done_when_the_copy_is(engine: VCacheEngine) -> None:
    paged = PagedPrompt(30, 4 * CHUNK).fill()
    stored = engine.store_async(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
    assert stored.result(DEADLINE_S) == 4
    assert stored.done()
    target = PagedPrompt(30, 4 * CHUNK)
    loaded = engine.retrieve_async(target.tokens, kvcaches=target.kvcaches, slot_mapping=target.slots)
    mask = loaded.result(DEADLINE_S)
    assert mask.all()
    assert target.wrong_tokens(mask) == 0


def test_what_exceeds_the_limit_is_refused_and_a_finished_one_makes_room() -> None:
    operations, go = Operations(), threading.Event()
    handles = [operations.submit(lambda: go.wait(DEADLINE_S)) for _ in range(ASYNC_OPERATIONS_MAX)]
    assert operations.submit(lambda: True) is None
    first = handles[0]
    assert first is not None
    assert not first.done()
    with pytest.raises(TimeoutError, match="not done after"):
        first.result(0.001)
    go.set()
    assert [handle.result(DEADLINE_S) for handle in handles if handle] == [True] * ASYNC_OPERATIONS_MAX
    again = operations.submit(lambda: 5)
    operations.close()
    assert again is not None
    assert again.result() == 5


def test_a_handle_raises_what_the_operation_raised() -> None:
    operations = Operations()

    def fail() -> int:
        raise RuntimeError("device fault")

    handle = operations.submit(fail)
    operations.close()
    assert handle is not None
    with pytest.raises(RuntimeError, match="device fault"):
        handle.result()


def test_close_waits_for_those_inside() -> None:
    gate, inside, leave, closed = Gate("g"), threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        with gate.call():
            inside.set()
            assert leave.wait(DEADLINE_S)
            assert not closed.is_set()

    def close() -> None:
        gate.close()
        closed.set()

    threads = [threading.Thread(target=work), threading.Thread(target=close)]
    threads[0].start()
    assert inside.wait(DEADLINE_S)
    threads[1].start()
    leave.set()
    assert closed.wait(DEADLINE_S)
    for thread in threads:
        thread.join(DEADLINE_S)
    with pytest.raises(EngineClosed), gate.call():
        pass


# -- lower tiers


def test_a_chunk_that_the_pool_lost_comes_from_the_tier_and_is_promoted(pool: Pool) -> None:
    tier = MemoryTier(1 << 20)
    keys = KEYS.keys(prompt(40, 3 * CHUNK), CHUNK)
    with make(pool, tiers=[tier], size="1MiB") as engine:
        store(engine, 40, 3 * CHUNK + 1)
        assert engine.flush_tiers(DEADLINE_S)
        assert tier.contains(keys) == [True] * 3
        assert counted(engine, "tier_written_chunks", "client_pinned") == [3, 0]
        pool.observer.remove(keys[1:2])
        assert [engine.contains(key) for key in keys] == [Location.POOL, Location.LOWER_TIER, Location.POOL]
        assert engine.lookup(prompt(40, 3 * CHUNK)) == 3 * CHUNK
        assert load(engine, 40, 3 * CHUNK) == [True] * 3 * CHUNK
        assert engine.contains(keys[1]) is Location.POOL
        assert counted(engine, "tier_hits", "tier_promoted_chunks") == [1, 1]
        assert engine.contains(b"?" * 32) is Location.NOWHERE


def test_many_chunks_come_from_the_tier_in_several_turns(pool: Pool) -> None:
    tier = MemoryTier(1 << 20)
    with make(pool, tiers=[tier], size="1MiB") as engine:
        store(engine, 41, 20 * CHUNK)
        assert engine.flush_tiers(DEADLINE_S)
        pool.observer.remove(KEYS.keys(prompt(41, 20 * CHUNK), CHUNK))
        tier.remove(KEYS.keys(prompt(41, 19 * CHUNK), CHUNK)[18:])
        assert engine.lookup(prompt(41, 20 * CHUNK)) == 18 * CHUNK
        assert load(engine, 41, 20 * CHUNK) == [True] * 18 * CHUNK + [False] * 2 * CHUNK
        assert counted(engine, "tier_promoted_chunks") == [18]


def test_a_full_queue_drops_and_counts(pool: Pool) -> None:
    tier = MemoryTier(1 << 20)
    with make(pool, tiers=[tier], size="1MiB", engine={"tier_queue_chunks": 2}) as engine:
        store(engine, 42, 6 * CHUNK)
        assert engine.flush_tiers(DEADLINE_S)
        written, dropped = counted(engine, "tier_written_chunks", "tier_dropped_chunks")
        assert (written, dropped, len(tier)) == (2, 4, 2)
        assert load(engine, 42, 6 * CHUNK) == [True] * 6 * CHUNK


def test_what_is_being_written_below_is_forgotten_too(pool: Pool) -> None:
    writing, go = threading.Event(), threading.Event()

    class Held(MemoryTier):
        def put(self, key: bytes, chunk: torch.Tensor, layout: bytes, expires_ms: int = 0) -> bool:
            writing.set()
            assert go.wait(DEADLINE_S)
            return super().put(key, chunk, layout, expires_ms)

    tier = Held(1 << 20)
    with make(pool, tiers=[tier], size="1MiB") as engine:
        store(engine, 43, 3 * CHUNK)
        assert writing.wait(DEADLINE_S)
        engine.clear()
        go.set()
        assert engine.flush_tiers(DEADLINE_S)
        assert len(tier) == 0
        assert engine.lookup(prompt(43, 3 * CHUNK)) == 0


# -- when things go wrong


def test_a_pool_that_is_too_small_keeps_the_prefix(pool: Pool) -> None:
    with Pool() as small:
        small.start_server()
        with make(small, size="128KiB") as engine:
            store(engine, 50, 64 * CHUNK)
            stored, unstored, full = counted(engine, "stored_chunks", "unstored_chunks", "failed_full_pool")
            assert 0 < stored < 64
            assert (stored + unstored, full) == (64, 1)
            assert engine.lookup(prompt(50, 64 * CHUNK)) == stored * CHUNK
            assert sum(load(engine, 50, 64 * CHUNK)) == stored * CHUNK
            for seed in range(51, 60):  # evicts what came before
                store(engine, seed, 4 * CHUNK)
            assert all(load(engine, 59, 4 * CHUNK))
            small.check()


def test_a_read_whose_extents_were_given_away_is_no_hit(pool: Pool, engine: VCacheEngine) -> None:
    with make(pool) as reader:
        store(engine, 60, 4 * CHUNK)
        keys = KEYS.keys(prompt(60, 4 * CHUNK), CHUNK)
        inside = reader._retrieve._pool
        grant = inside.acquire(keys)
        assert grant is not None
        with inside.borrowed(grant.extents, [LAYOUT.chunk_bytes] * 4, grant.lineage):
            assert inside.intact(grant, 0, 4)
            pool.observer.remove(keys[3:])
            assert not inside.intact(grant, 0, 4)
            assert inside.intact(grant, 0, 3)
        inside.release(grant)
        assert counted(reader, "failed_fence_broken") == [1]
        assert load(reader, 60, 4 * CHUNK) == [True] * 3 * CHUNK + [False] * CHUNK


def test_a_dead_server_is_a_miss_at_once_and_its_successor_serves_what_was_there() -> None:
    tier = MemoryTier(1 << 20)
    with Pool() as own:
        own.start_server()
        with make(own, size="1MiB", tiers=[tier]) as engine:
            store(engine, 70, 3 * CHUNK)
            assert engine.flush_tiers(DEADLINE_S)
            tier.remove(KEYS.keys(prompt(70, 3 * CHUNK), CHUNK)[2:])
            own.kill_server()
            wait_until(lambda: not engine.connected)
            # What the tier has can be had without the server.
            assert load(engine, 70, 3 * CHUNK) == [True] * 2 * CHUNK + [False] * CHUNK
            tier.clear()
            seconds = []
            for _ in range(200):
                started = time.perf_counter()
                assert engine.lookup(prompt(70, 3 * CHUNK)) == 0
                seconds.append(time.perf_counter() - started)
            assert statistics.median(seconds) < 1e-3
            store(engine, 71, CHUNK)
            assert counted(engine, "connected") == [0]
            own.start_server()
            assert engine.wait_connected(DEADLINE_S)
            assert load(engine, 70, 3 * CHUNK) == [True] * 3 * CHUNK
            own.check()


def test_a_dead_holder_is_a_miss() -> None:
    with Pool() as own:
        own.start_server()
        holder = own.engine(size="1MiB")
        holder.call("store", 80, 3 * CHUNK)
        with make(own, device="shm:1") as engine:
            assert load(engine, 80, 3 * CHUNK) == [True] * 3 * CHUNK
            holder.kill()
            wait_until(lambda: not own.statistics().segments)
            assert load(engine, 80, 3 * CHUNK) == [False] * 3 * CHUNK
            store(engine, 81, CHUNK)
            assert counted(engine, "failed_full_pool", "unstored_chunks") == [1, 1]
        own.check()


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll, yielding the processor, until `condition()` is true; AssertionError after DEADLINE_S."""
    changed, deadline_s = threading.Event(), time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        changed.wait(0.005)


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


def test_memory_that_a_device_cannot_reach_is_a_miss(engine: VCacheEngine) -> None:
    """As when an engine on a GPU is granted chunks of a segment in plain shared memory."""
    store(engine, 70, CHUNK)
    pool = engine._retrieve._pool
    grant = pool.acquire(KEYS.keys(prompt(70, CHUNK), CHUNK))
    assert grant is not None
    before = counted(engine, "failed_other_memory")[0]
    for kind, reached in (("cuda", False), ("cpu", True), (None, True)):
        with pool.borrowed(grant.extents, [LAYOUT.chunk_bytes], grant.lineage, kind) as (view,):
            assert (view is not None) == reached
    assert counted(engine, "failed_other_memory") == [before + 1]
    pool.release(grant)
