"""LMCache's multiprocess mode on our L2 adapter: what its L1 has lost comes back out of the pool."""

from __future__ import annotations

from typing import Any

import torch

from tests.lmcache.server import adapter_of
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S, eventually

CHUNKS = 12
SHAPE = (2, 3, 16, 16)


def open_storage(child: Any, adapter: str) -> None:
    """The storage manager that `lmcache server` runs, from the same arguments."""
    from lmcache.v1.distributed.config import parse_args
    from lmcache.v1.distributed.storage_manager import StorageManager

    options = ["--l1-size-gb", "0.05", "--no-l1-use-lazy", "--eviction-policy", "LRU"]
    child.kept["storage"] = StorageManager(parse_args([*options, "--l2-adapter", adapter]))


def _keys() -> list[Any]:
    from lmcache.v1.distributed.api import ObjectKey

    return [
        ObjectKey(chunk_hash=number.to_bytes(16, "big"), model_name="m", kv_rank=0)
        for number in range(CHUNKS)
    ]


def _layout() -> Any:
    from lmcache.v1.distributed.api import MemoryLayoutDesc

    return MemoryLayoutDesc([torch.Size(SHAPE)], [torch.float32])


def _content(number: int) -> torch.Tensor:
    return torch.arange(torch.Size(SHAPE).numel(), dtype=torch.float32).reshape(SHAPE) + 1000 * number


def write(child: Any) -> None:
    """Chunks of known bytes, into L1."""
    storage, keys = child.kept["storage"], _keys()
    views = storage.reserve_write(keys, _layout())
    assert len(views) == CHUNKS
    for number, key in enumerate(keys):
        views[key].tensor.copy_(_content(number))
    storage.finish_write(keys)


def clear_l1(child: Any) -> None:
    """Empty L1; what a store that is just ending has locked stays a moment longer."""
    storage = child.kept["storage"]

    def empty() -> bool:
        storage.clear()
        return bool(storage.get_l1_usage()[0] == 0)

    eventually(empty, "L1 is empty")


def load(child: Any) -> tuple[int, int, int]:
    """Prefetch all of them: (hits, of these out of L2, right ones)."""
    from lmcache.v1.distributed.api import GroupedObjectKeys, PrefetchTaskSpec

    storage, keys = child.kept["storage"], _keys()
    handle = storage.submit_prefetch_task(PrefetchTaskSpec([GroupedObjectKeys(keys, 0, _layout())]))
    assert storage.wait_prefetch_status(handle, DEADLINE_S)
    result = storage.query_prefetch_status(handle)
    hits = sum(row.popcount() for row in result.hit_cells)
    right = 0
    if hits == CHUNKS:
        with storage.read_prefetched_results(keys) as views:
            right = sum(view.tensor.equal(_content(number)) for number, view in enumerate(views))
        storage.finish_read_prefetched(keys)
    return hits, sum(row.popcount() for row in result.l2_hit_cells), right


def close_storage(child: Any) -> None:
    child.kept["storage"].close()


def test_what_l1_lost_comes_back_also_in_another_process(pool: Pool) -> None:
    pool.start_holder(size="8MiB")
    workers = [pool.start_worker(), pool.start_worker()]
    for worker in workers:
        worker.call("run", open_storage, adapter_of(pool))
    first, second = workers
    first.call("run", write)
    pool.eventually(lambda pool: pool.counters().get("committed", 0) == CHUNKS, "all are in the pool")
    first.call("run", clear_l1)
    assert first.call("run", load) == (CHUNKS, CHUNKS, CHUNKS)
    assert second.call("run", load) == (CHUNKS, CHUNKS, CHUNKS)
    pool.kill_server()
    second.call("run", clear_l1)
    hits, _, right = second.call("run", load)
    assert hits == right == 0
    pool.start_server()
    for worker in workers:
        worker.call("run", close_storage)
    pool.assert_nothing_leaks()
