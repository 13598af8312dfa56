"""Pieces of the engine that need no server: what is counted and logged, what is kept, what is moved."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from vcache.engine.handles import Operations
from vcache.engine.stats import Cause, Counters
from vcache.engine.transfers import DescribedTensors, Transfers
from vcache.keys import KeyChain
from vcache.layout import KVLayout
from vcache.limits import ASYNC_OPERATIONS_MAX, FAILURE_LOG_INTERVAL_S

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_size=2, dtype="float32", chunk_tokens=4)


class Clock:
    """Time that passes when told to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def paged() -> list[torch.Tensor]:
    return [torch.zeros(2, 8, 2, 1, 2) for _ in range(2)]


def transfers(*, partial: bool = False) -> Transfers:
    return Transfers(LAYOUT, KeyChain(LAYOUT.fingerprint, "m"), "kpshd", partial=partial)


def test_a_failure_is_logged_once_in_a_while_and_counted_always(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    counters = Counters(clock)
    with caplog.at_level(logging.WARNING, "vcache.engine"):
        for _ in range(3):
            counters.failed(Cause.NO_SERVER, "gone")
        counters.failed(Cause.TIER, "disk gone", tier="rocksdb")
        clock.now_s = FAILURE_LOG_INTERVAL_S
        counters.failed(Cause.NO_SERVER, "gone")
    assert [record.getMessage() for record in caplog.records] == [
        "failed no server: gone",
        "failed tier: disk gone tier=rocksdb",
        "failed no server: gone unlogged=2",
    ]
    snapshot = counters.snapshot()
    assert (snapshot["failed_no_server"], snapshot["failed_tier"]) == (4, 1)


def test_seconds_count_also_when_the_block_fails() -> None:
    clock = Clock()
    counters = Counters(clock)

    def fail() -> None:
        with counters.seconds("store_seconds"):
            clock.now_s = 2.5
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert counters.snapshot()["store_seconds"] == 2.5


def test_the_same_tensors_are_described_once() -> None:
    described, tensors = DescribedTensors("kpshd", LAYOUT), paged()
    first = described.describe(tensors)
    assert described.describe(list(tensors)) is first
    assert described.describe({"a": tensors[0], "b": tensors[1]}) is first
    others = [paged() for _ in range(3)]
    for other in others:
        assert described.describe(other) is not first
    assert described.describe(tensors) is not first
    described.forget()
    assert described.describe(others[2]) is not first


def test_a_view_of_other_shape_at_the_same_address_is_described_anew() -> None:
    described, tensors = DescribedTensors("kpshd", LAYOUT), paged()
    whole = described.describe(tensors)
    half = described.describe([tensor[:, :4] for tensor in tensors])
    assert (whole.num_slots, half.num_slots) == (16, 8)


def test_a_transfer_holds_whole_chunks_behind_the_mask() -> None:
    tokens = list(range(11))
    slots = [15, 14, 13, 12, 0, 1, -1, 3, 4, 5, 6]
    transfer, has_slot, masked = transfers().of_tokens(
        tokens, mask=None, offset=4, kvcaches=paged(), slot_mapping=slots
    )
    assert masked == 4
    assert transfer.keys == KeyChain(LAYOUT.fingerprint, "m").keys(tokens, 4)[1:]
    assert transfer.sizes == [LAYOUT.chunk_bytes]
    assert transfer.ids.tolist() == [0, 1, -1, 3]
    assert has_slot.tolist() == [True] * 6 + [False] + [True] * 4
    assert len(transfer.with_all_ids()) == 0


def test_a_partial_chunk_is_the_last_and_smaller() -> None:
    transfer, _, _ = transfers(partial=True).of_tokens(
        range(11), mask=None, offset=None, kvcaches=paged(), slot_mapping=range(11)
    )
    assert transfer.sizes == [LAYOUT.chunk_bytes, LAYOUT.chunk_bytes, 3 * LAYOUT.token_bytes]
    assert [transfer.tokens_in(size) for size in transfer.sizes] == [4, 4, 3]
    assert transfer.part(1).ids.tolist() == [4, 5, 6, 7, 8, 9, 10]
    picked = transfer.pick([0, 2])
    assert picked.ids.tolist() == [0, 1, 2, 3, 8, 9, 10]
    assert picked.keys == [transfer.keys[0], transfer.keys[2]]


def test_an_operation_that_found_no_thread_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor queues before it starts a thread: by then the pages would be somebody else's."""
    operations, ran = Operations(), []

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", no_thread)
        for _ in range(2 * ASYNC_OPERATIONS_MAX):
            assert operations.submit(lambda: ran.append("late")) is None
    handle = operations.submit(lambda: ran.append("now"))
    assert handle is not None
    handle.result(60)
    operations.close()
    assert ran == ["now"]
