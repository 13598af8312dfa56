"""A GPU's holder in the pool: who finds it, and what its death does to those who read. Run with -m gpu."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.client_pool import LAYOUT, SIZE, key, store
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S, eventually
from vcache.client import Client
from vcache.config import load
from vcache.engine.pool import Pool as EnginePool
from vcache.engine.stats import Counters
from vcache.layout import KVLayout
from vcache.segment import device_label

pytestmark = pytest.mark.gpu


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool() as pool:
        pool.start_server()
        yield pool


@contextmanager
def client(pool: Pool) -> Iterator[Client]:
    """A client of this process on cuda:0 that lends nothing."""
    made = Client(load(**pool.client_config(), device="cuda:0").config, name="reader")
    try:
        assert made.wait_connected(DEADLINE_S)
        yield made
    finally:
        made.close()


def test_an_engine_finds_the_holder_on_its_gpu_by_uuid(pool: Pool) -> None:
    pool.start_holder("shm:0", "64MiB")
    _, number = pool.start_holder("cuda:0", "16MiB")
    (label,) = {row.device for row in pool.statistics().segments if row.segment == number}
    assert label == device_label("cuda:0")
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_size=64, dtype="float16", chunk_tokens=16)
    with client(pool) as reader:
        assert EnginePool(reader, Counters(), layout, "model", "cuda:0")._near() == number


def test_a_holder_killed_under_a_reading_kernel(pool: Pool) -> None:
    """The reader lives, its fence fails, and the memory goes with its last copy."""
    holder, number = pool.start_holder("cuda:0", "64MiB")
    with client(pool) as reader:
        assert store(reader, [1]) == 1
        grant = reader.acquire([key(1)], layout=LAYOUT)
        assert int(grant.extents["segment"][0]) == number
        memory = reader.segment(number, grant.lineage)
        assert memory is not None
        borrow = memory.borrow()
        assert borrow is not None
        view = memory.view(int(grant.extents["offset"][0]), SIZE)
        right = view.cpu()
        assert reader.intact(grant)
        copies = torch.empty(64, SIZE, dtype=torch.uint8, device="cuda:0")
        torch.cuda._sleep(500_000_000)
        for copy in copies:
            copy.copy_(view)
        holder.kill()
        holder.wait(DEADLINE_S)
        for copy in copies[32:]:
            copy.copy_(view)
        torch.cuda.synchronize()
        assert all(torch.equal(copy.cpu(), right) for copy in copies)
        eventually(lambda: not reader.intact(grant), "what was read is a miss")
        eventually(lambda: memory.borrow() is None, "the reader was told")
        assert not memory.gone
        borrow.release()
        assert memory.gone
        assert torch.ones(8, device="cuda:0").sum().item() == 8, "this process goes on using the GPU"
    pool.assert_nothing_leaks()
