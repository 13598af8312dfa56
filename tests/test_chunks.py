"""Chunks that say what they hold: forms, drafts out of the stock, holds; with a real server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.client_pool import Pool, key, pool_in_memory
from tests.processes.worker import DEADLINE_S, eventually
from vcache.client import Client
from vcache.engine.chunks import Chunks, Draft, Part
from vcache.engine.forms import Form, decode
from vcache.engine.lower import LowerTiers
from vcache.engine.stats import Counters
from vcache.engine.tier_queue import TierQueues
from vcache.engine.write_back import WriteBack
from vcache.errors import ArgumentError, RemoteProtocolError, SegmentError
from vcache.layout import KVLayout
from vcache.limits import FORM_BYTES, PART_ALIGN_BYTES, SAVES_MAX, STOCK_REFILL_EXTENTS
from vcache.tiers import Found, MemoryTier

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_size=8, dtype="float32", chunk_tokens=16)
FORM = Form(((2, 3, 16), (5,)), ("float32", "uint8"), 7)
LAYERS = Form(((16, 10),), ("bfloat16",), 3, 4)


@pytest.mark.parametrize("form", [FORM, LAYERS])
def test_a_form_is_read_as_it_was_written(form: Form) -> None:
    end = form.encode()
    assert len(end) == FORM_BYTES
    assert decode(end, form.chunk_bytes) == form
    assert form.stride % PART_ALIGN_BYTES == 0 and form.stride >= form.part_bytes
    assert form.chunk_bytes == form.stride * form.parts + FORM_BYTES


def test_parts_lie_beside_each_other() -> None:
    chunk = torch.arange(LAYERS.chunk_bytes, dtype=torch.int64).to(torch.uint8)
    parts = [LAYERS.part(chunk, number) for number in range(4)]
    assert {part.numel() for part in parts} == {LAYERS.part_bytes}
    begins = [part.data_ptr() - chunk.data_ptr() for part in parts]
    assert begins == [number * LAYERS.stride for number in range(4)]


@pytest.mark.parametrize(
    "form",
    [
        Form((), (), 0),
        Form(((2,),), ("float32", "uint8"), 0),
        Form(((0, 4),), ("uint8",), 0),
        Form(((1,),) * 900, ("uint8",) * 900, 0),
        Form(((1 << 32,),), ("uint8",), 0),
        Form(((1,),), ("uint8",), 0, 0),
    ],
)
def test_a_form_that_cannot_be_is_refused(form: Form) -> None:
    with pytest.raises((ArgumentError, ValueError)):
        form.encode()


@pytest.mark.parametrize(
    "end",
    [
        b"",
        bytes(FORM_BYTES),
        FORM.encode()[:-1],
        b"x" + FORM.encode()[1:],
        FORM.encode().replace(b"float32", b"flaot32"),
        FORM.encode().replace(b"float32", b"Tensor_"),
        FORM.encode()[:16] + b"\xff\xff\xff\xff" + FORM.encode()[20:],
    ],
)
def test_what_a_peer_wrote_is_not_believed(end: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(end, FORM.chunk_bytes)


def test_a_form_of_another_length_is_not_believed() -> None:
    with pytest.raises(RemoteProtocolError, match="of a chunk of"):
        decode(FORM.encode(), FORM.chunk_bytes + 1)


@pytest.fixture
def pool() -> Iterator[Pool]:
    with pool_in_memory() as pool:
        pool.start()
        yield pool


def chunks_of(client: Client, **given: Any) -> Chunks:
    return Chunks(client, layout=LAYOUT, model="m", device="shm:0", counters=Counters(), **given)


def write(chunks: Chunks, numbers: list[int], form: Form = FORM) -> list[Draft]:
    """Store a chunk under each number; its bytes follow from it."""
    drafts = chunks.draft(form, len(numbers))
    parts = []
    for number, draft in zip(numbers, drafts, strict=False):
        for at in range(form.parts):
            draft.part(at).fill_((number * 7 + at) % 256)
            parts.append(Part(draft, at, key(number)))
    chunks.put(parts)
    for part in parts:
        chunks.free(part.draft, part.number)
    return drafts


def test_another_process_client_reads_what_was_written(pool: Pool) -> None:
    writer, reader = chunks_of(pool.client(lends=1 << 20)), chunks_of(pool.client())
    write(writer, [1, 2, 3])
    write(writer, [4], LAYERS)
    holds = reader.take([key(number) for number in (1, 9, 3, 4, 1)])
    assert [hold is not None for hold in holds] == [True, False, True, True, True]
    there = [hold for hold in holds if hold is not None]
    forms = reader.forms(there)
    assert forms == [FORM, FORM, LAYERS, FORM]
    for hold, form, number in zip(there, forms, (1, 3, 4, 1), strict=True):
        assert form is not None
        for at in range(form.parts):
            assert np.all(form.part(hold.chunk, at).numpy() == (number * 7 + at) % 256)
    assert reader.held == 3 and there[0] is there[3]
    reader.drop_all(holds)
    assert reader.held == 0
    writer.close()
    reader.close()


def test_a_chunk_is_there_when_its_last_part_is(pool: Pool) -> None:
    chunks = chunks_of(pool.client(lends=1 << 20))
    (draft,) = chunks.draft(LAYERS, 1)
    for at in (2, 0, 3):
        chunks.put([Part(draft, at, key(1))])
        chunks.put([Part(draft, at, key(1))])  # again: nothing
        assert chunks.count([key(1)]) == 0
    chunks.put([Part(draft, 1, key(2))])  # of another chunk: nothing
    assert chunks.count([key(2)]) == 0
    chunks.put([Part(draft, 1, key(1))])
    assert chunks.count([key(1)]) == 1
    for at in (0, 1, 2, 3, 3, 0):
        chunks.free(draft, at)
    assert chunks.drafts == 0
    chunks.close()


def test_what_is_not_put_goes_back_to_the_stock_and_to_the_server(pool: Pool) -> None:
    client = pool.client(lends=1 << 20)
    chunks = chunks_of(client)
    for draft in chunks.draft(FORM, 2):
        chunks.free(draft, 0)
        chunks.free(draft, 0)
    assert chunks.stocked == 2 and client.counters["reserved"] == 2
    drafts = chunks.draft(FORM, 3)  # two of the stock; a size that is asked for again is stocked up
    assert client.counters["reserved"] == 2 + STOCK_REFILL_EXTENTS
    for draft in drafts:
        chunks.free(draft, 0)
    chunks.drain()
    assert chunks.stocked == client.counters["reserved"] == 0
    client.check()


def test_the_loser_of_a_key_gets_its_extent_back(pool: Pool) -> None:
    client = pool.client(lends=1 << 20)
    chunks = chunks_of(client)
    write(chunks, [1])
    write(chunks, [1])
    assert chunks.counters.snapshot()["present_chunks"] == 1
    chunks.drain()
    assert client.counters["reserved"] == 0
    client.check()


def test_a_full_pool_drafts_less_and_another_size_gives_way(pool: Pool) -> None:
    client = pool.client(lends=256 << 10)
    chunks = chunks_of(client)
    large = Form(((40_000,),), ("uint8",), 0)
    drafts = chunks.draft(large, 100)
    assert 0 < len(drafts) < 100
    snapshot = chunks.counters.snapshot()
    assert snapshot["unstored_chunks"] == 100 - len(drafts) and snapshot["failed_full_pool"] > 0
    for draft in drafts:
        chunks.free(draft, 0)
    small = chunks.draft(Form(((1000,),), ("uint8",), 0), 4)  # what waits in the stock makes room
    assert len(small) == 4
    for draft in small:
        chunks.free(draft, 0)
    chunks.drain()
    client.check()


def test_holds_survive_eviction_removal_and_a_restart(pool: Pool) -> None:
    client = pool.client(lends=256 << 10)
    chunks = chunks_of(client)
    write(chunks, [1])
    (hold,) = chunks.take([key(1)])
    assert hold is not None
    assert chunks.remove([key(1)]) == 1
    assert chunks.take([key(1)]) == [None]
    pool.kill()
    pool.start()
    assert client.wait_connected(20)
    write(chunks, list(range(2, 200)))
    assert np.all(FORM.part(hold.chunk, 0).numpy() == 7)
    chunks.drop(hold)
    chunks.close()
    client.check()


def test_what_the_pool_lost_comes_back_from_a_lower_tier(pool: Pool) -> None:
    client = pool.client(lends=1 << 20)
    chunks = chunks_of(client, tiers=[MemoryTier(1 << 20)], tier_queue_chunks=16)
    write(chunks, [1, 2, 3])
    assert chunks.flush_tiers(20)
    assert client.clear() == 3
    wanted = [key(1), key(2), key(9)]
    assert chunks.count(wanted) == 2
    holds = chunks.take_prefix(wanted, FORM.chunk_bytes)
    assert len(holds) == 2 and chunks.forms(holds) == [FORM, FORM]
    assert np.all(FORM.part(holds[1].chunk, 0).numpy() == 14)
    chunks.drop_all(holds)
    assert chunks.counters.snapshot()["tier_promoted_chunks"] == 2
    chunks.close()
    client.check()


def test_write_back_writes_what_has_to_go(pool: Pool) -> None:
    client, tier = pool.client(lends=1 << 20), MemoryTier(1 << 24)
    chunks = chunks_of(client, tiers=[tier], tier_queue_chunks=16, write_back=True)
    write(chunks, [1, 2, 3])
    assert chunks.flush_tiers(20) and len(tier) == 0
    number = 3

    def some_are_below() -> bool:
        nonlocal number
        number += 1
        write(chunks, [number])
        return len(tier) > 4

    eventually(some_are_below, "chunks are written before they are evicted")
    (hold,) = chunks.take_prefix([next(iter(tier._kept))], FORM.chunk_bytes)
    chunks.drop(hold)
    chunks.close()
    client.check()


def test_a_draft_waits_for_what_is_copied_before_it_goes(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tier(MemoryTier):
        """Keeps nothing before a draft waits for it."""

        def put(self, *given: Any) -> bool:
            return waited.wait(20) and super().put(*given)

    class Never(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.set()
            return super().wait(timeout)

    waited, tier = threading.Event(), Tier(1 << 24)
    client = pool.client(lends=1 << 20)
    chunks = chunks_of(client, tiers=[tier], tier_queue_chunks=16, write_back=True)
    monkeypatch.setattr(chunks._pool, "_never", Never())
    number = 0

    def a_draft_waits() -> bool:
        nonlocal number
        number += 1
        assert len(write(chunks, [number])) == 1
        return waited.is_set()

    eventually(a_draft_waits, "a draft waits")
    chunks.close()
    client.check()


def test_what_was_below_already_stays_there_when_the_server_ends(pool: Pool) -> None:
    class Tier(MemoryTier):
        """Has all chunks of old; the server ends while it is asked for the first one."""

        def contains(self, keys: Sequence[bytes]) -> list[bool]:
            asked.extend(keys)
            pool.kill()
            return super().contains(keys)

    asked: list[bytes] = []
    tier = Tier(1 << 24)
    for number in range(1, 400):
        assert tier.put(key(number), torch.zeros(8, dtype=torch.uint8), b"L" * 16)
    client = pool.client(lends=1 << 20)
    chunks = chunks_of(client, tiers=[tier], tier_queue_chunks=16, write_back=True)
    number = 0

    def somebody_asks() -> bool:
        nonlocal number
        number += 1
        write(chunks, [number])
        return bool(asked)

    eventually(somebody_asks, "a chunk has to go down")
    assert chunks.flush_tiers(20)
    assert len(tier) == 399
    chunks.close()


def test_a_tier_that_hangs_keeps_no_chunk_from_the_others(pool: Pool) -> None:
    class Hanging(MemoryTier):
        def put(self, *given: Any) -> bool:
            go_on.wait()
            return False

    go_on = threading.Event()
    client, healthy, counters = pool.client(lends=1 << 20), MemoryTier(1 << 24), Counters()
    chunks = chunks_of(client)
    lower = LowerTiers([Hanging(1 << 24), healthy], LAYOUT.fingerprint, counters, deadline_s=2.0)
    queues = TierQueues(chunks._pool, lower, 16, counters)
    write_back = WriteBack(client, queues)
    number = 0

    def all_but_those_that_hang_go_on() -> bool:
        nonlocal number
        write(chunks, list(range(number, number + 2 * SAVES_MAX)))
        number += 2 * SAVES_MAX
        return len(healthy) > 2 * SAVES_MAX

    try:
        eventually(all_but_those_that_hang_go_on, "chunks are written to the other tier")
    finally:
        go_on.set()
        write_back.close()
        queues.close()
        lower.close()
        chunks.close()


def test_what_is_forgotten_is_forgotten_below_too(pool: Pool) -> None:
    client = pool.client(lends=1 << 20)
    chunks = chunks_of(client, tiers=[MemoryTier(1 << 20)], tier_queue_chunks=16)
    write(chunks, [1, 2, 3])
    assert chunks.flush_tiers(20)
    assert chunks.remove([key(1)]) == 1
    assert chunks.count([key(1)]) == 0 and chunks.count([key(2), key(3)]) == 2
    assert chunks.clear() == 2
    assert chunks.count([key(2)]) == 0
    chunks.close()


def test_what_another_process_removes_is_not_taken_again_although_it_is_held(pool: Pool) -> None:
    chunks, other = chunks_of(pool.client(lends=1 << 20)), chunks_of(pool.client())
    write(chunks, [1, 2])
    held = chunks.take([key(1), key(2)])
    assert other.remove([key(1)]) == 1
    again = chunks.take([key(1), key(2)])
    assert again == [None, held[1]]
    write(chunks, [1])
    anew = chunks.take([key(1), key(1)])
    assert anew[0] is anew[1] and anew[0] not in (None, held[0])
    for holds in (held, again, anew):
        chunks.drop_all(holds)
    assert chunks.held == 0
    for each in (chunks, other):
        each.close()


class Watched(MemoryTier):
    """A read, and a removal, can be held until the test lets it go on."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.holds_get = self.holds_forget = False
        self.getting, self.forgetting, self.go = threading.Event(), threading.Event(), threading.Event()

    def get(self, key: bytes, into: torch.Tensor, layout: bytes) -> Found | None:
        found = super().get(key, into, layout)
        self.getting.set()
        assert not self.holds_get or self.go.wait(DEADLINE_S)
        return found

    def remove(self, keys: Sequence[bytes]) -> int:
        self._hold()
        return super().remove(keys)

    def clear(self) -> None:
        self._hold()
        super().clear()

    def _hold(self) -> None:
        self.forgetting.set()
        assert not self.holds_forget or self.go.wait(DEADLINE_S)


def below_only(pool: Pool) -> tuple[Client, Chunks, Watched]:
    """Three chunks that only a tier has."""
    client, tier = pool.client(lends=1 << 20), Watched()
    chunks = chunks_of(client, tiers=[tier], tier_queue_chunks=16)
    write(chunks, [1, 2, 3])
    assert chunks.flush_tiers(20)
    assert client.clear() == 3
    return client, chunks, tier


def take(chunks: Chunks, numbers: list[int]) -> None:
    chunks.drop_all(chunks.take([key(number) for number in numbers], FORM.chunk_bytes))


FORGET: dict[str, Callable[[Chunks], int]] = {
    "remove": lambda chunks: chunks.remove([key(1), key(2)]),
    "clear": Chunks.clear,
}


@pytest.mark.parametrize("forget", FORGET.values(), ids=FORGET)
def test_what_is_forgotten_while_it_is_read_below_does_not_come_up(
    pool: Pool, forget: Callable[[Chunks], int]
) -> None:
    client, chunks, tier = below_only(pool)
    tier.holds_get = True
    taking = threading.Thread(target=take, args=(chunks, [1, 2]))
    taking.start()
    assert tier.getting.wait(DEADLINE_S)
    forget(chunks)
    tier.go.set()
    taking.join(DEADLINE_S)
    assert client.contains([key(1), key(2)]) == [False, False]
    assert chunks.take([key(1)], FORM.chunk_bytes) == [None]
    assert chunks.counters.snapshot()["tier_promoted_chunks"] == 0
    chunks.close()
    client.check()
    assert client.counters["reserved"] == 0


@pytest.mark.parametrize("forget", FORGET.values(), ids=FORGET)
def test_what_is_read_below_before_a_tier_has_forgotten_it_does_not_come_up(
    pool: Pool, forget: Callable[[Chunks], int]
) -> None:
    client, chunks, tier = below_only(pool)
    tier.holds_forget = True
    forgetting = threading.Thread(target=forget, args=(chunks,))
    forgetting.start()
    assert tier.forgetting.wait(DEADLINE_S)  # the pool has forgotten it
    take(chunks, [1, 2])
    tier.go.set()
    forgetting.join(DEADLINE_S)
    assert client.contains([key(1), key(2)]) == [False, False]
    chunks.close()


def test_what_was_not_removed_comes_up_all_the_same(pool: Pool) -> None:
    client, chunks, tier = below_only(pool)
    tier.holds_get = True
    taking = threading.Thread(target=take, args=(chunks, [1, 2, 3]))
    taking.start()
    assert tier.getting.wait(DEADLINE_S)
    chunks.remove([key(2)])
    tier.go.set()
    taking.join(DEADLINE_S)
    assert client.contains([key(1), key(2), key(3)]) == [True, False, True]
    chunks.close()
    client.check()


def test_without_a_server_everything_is_a_miss(pool: Pool) -> None:
    client = pool.client(lends=1 << 20)
    chunks = chunks_of(client)
    write(chunks, [1])
    drafts = chunks.draft(FORM, 1)
    pool.kill()
    assert chunks.count([key(1)]) == chunks.lease([key(1)]) == chunks.remove([key(1)]) == chunks.clear() == 0
    assert chunks.take([key(1)]) == [None]
    chunks.put([Part(drafts[0], 0, key(5))])
    chunks.free(drafts[0], 0)
    assert chunks.draft(FORM, 50) == [] or chunks.stocked == 0
    assert chunks.capacity_bytes() == 0
    chunks.close()


def test_memory_that_the_applications_gpu_cannot_reach_is_a_miss(pool: Pool) -> None:
    def refuse(address: int, size: int) -> Callable[[], None]:
        raise SegmentError("no pages may be locked")

    undone: list[int] = []
    writer = chunks_of(pool.client(lends=1 << 20), registrar=lambda at, _: lambda: undone.append(at))
    reader = chunks_of(pool.client(), registrar=refuse)
    assert write(writer, [1])
    assert reader.take([key(1)]) == [None]
    assert reader.draft(FORM, 1) == []
    assert reader.counters.snapshot()["failed_other_memory"] > 0
    (hold,) = writer.take([key(1)])
    assert hold is not None and not undone
    writer.drop(hold)
    for chunks in (writer, reader):
        chunks.close()
