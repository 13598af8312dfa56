"""The backend's own promises, method by method, inside a worker with a real LMCacheEngine."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import pytest

from tests.lmcache import engine
from tests.processes.content import prompt
from tests.processes.pool import Pool
from tests.processes.worker import eventually
from vcache.engine.stats import Cause

CHUNK = engine.CHUNK_TOKENS
TOKENS = 4 * CHUNK


def _keys(child: Any, seed: int) -> list[Any]:
    database = child.engine.token_database
    return [key for _, _, key in database.process_tokens(tokens=prompt(seed, TOKENS))]


def surplus_downs(child: Any) -> None:
    backend = child.kept["backend"]
    keys = _keys(child, 1)
    first, second = backend.batched_get_blocking(keys[:1]) + backend.batched_get_blocking(keys[:1])
    assert first is not second and first.get_ref_count() == 1
    before = second.raw_tensor.clone()
    for _ in range(5):
        first.ref_count_down()
    assert first.tensor is None and first.get_ref_count() == 0
    assert second.raw_tensor.equal(before)
    downs = [threading.Thread(target=second.ref_count_down) for _ in range(8)]
    for thread in downs:
        thread.start()
    for thread in downs:
        thread.join()
    assert backend.get_stats()["held_chunks"] == 0
    kept = backend.get_blocking(keys[1])
    del kept
    gc.collect()
    assert backend.get_stats()["held_chunks"] == 0
    pinned = backend.get_blocking(keys[1])
    pinned.pin()
    pinned.ref_count_down()
    assert backend.get_stats()["held_chunks"] == 1
    pinned.unpin()
    pinned.unpin()
    assert backend.get_stats()["held_chunks"] == 0


def allocated_and_dropped(child: Any) -> None:
    import torch
    from lmcache.v1.memory_management import MemoryFormat

    backend = child.kept["backend"]
    shape = torch.Size([2, engine.LAYERS, CHUNK, engine.HEADS * engine.HEAD_SIZE])
    one = backend.allocate(shape, torch.float32, MemoryFormat.KV_2LTD)
    many = backend.batched_allocate(shape, torch.float32, 3, MemoryFormat.KV_2LTD)
    assert backend.get_stats()["drafts"] == 4
    for view in (one, *many):
        view.ref_count_down()
        view.ref_count_down()
    assert backend.get_stats()["drafts"] == 0
    stocked = backend.get_stats()["stocked_extents"]
    assert stocked >= 4
    again = backend.allocate(shape, torch.float32, MemoryFormat.KV_2LTD)
    assert backend.get_stats()["stocked_extents"] == stocked - 1  # no request: it came out of the stock
    again.ref_count_down()
    assert backend.calculate_chunk_budget() >= 2
    assert backend.get_allocator_backend() is backend
    assert backend.get_memory_allocator() is backend.initialize_allocator(None, None)
    assert backend.get_memory_allocator().memcheck()


def every_method(child: Any) -> None:
    backend = child.kept["backend"]
    keys = _keys(child, 1)
    missing = _keys(child, 99)
    assert backend.contains(keys[0]) and not backend.contains(missing[0])
    assert backend.batched_contains(keys + missing) == len(keys)
    assert backend.pin(keys[0]) and backend.unpin(keys[0]) and not backend.unpin(keys[0])
    assert not backend.pin(missing[0])
    assert not backend.exists_in_put_tasks(keys[0])
    assert backend.get_blocking(missing[0]) is None
    assert backend.batched_get_blocking(missing) == [None] * len(missing)
    view = backend.get_non_blocking(keys[0]).result()
    view.ref_count_down()
    assert backend.touch_cache() is None and backend.cancel_request("nobody") is None

    async def asynchronously() -> None:
        assert await backend.batched_async_contains("a", keys + missing, True) == len(keys)
        views = await backend.batched_get_non_blocking("a", keys)
        assert len(views) == len(keys)
        for view in views:
            view.ref_count_down()
        assert await backend.batched_async_contains("b", keys, True) == len(keys)
        backend.cancel_request("b")
        assert await backend.batched_async_contains("c", missing, True) == 0
        assert await backend.batched_get_non_blocking("c", missing) == []

    asyncio.run(asynchronously())
    assert backend.remove(keys[0]) and not backend.remove(keys[0])
    assert backend.batched_remove(keys) == len(keys) - 1
    stats = backend.get_stats()
    assert stats["pins"] == stats["promises"] == stats["held_chunks"] == stats["failures"] == 0


def nonsense(child: Any) -> None:
    """Whatever is passed, nothing is raised."""
    backend = child.kept["backend"]
    assert backend.contains(None) is False
    assert backend.batched_contains([object()], True) == 0
    assert backend.get_blocking("key") is None
    assert backend.batched_get_blocking([1, 2]) == [None, None]
    assert backend.batched_submit_put_task([None], [None]) is None
    assert backend.allocate("shape", "dtype") is None
    assert backend.remove(3) is False and backend.unpin({}) is False
    assert asyncio.run(backend.batched_async_contains("x", [None])) == 0
    assert asyncio.run(backend.batched_get_non_blocking("x", [None])) == []
    assert backend.get_stats()["failures"] >= 9


@pytest.mark.contract
def test_every_method(pool: Pool) -> None:
    pool.start_holder(size="8MiB")
    worker = engine.start(pool)
    worker.call("run", allocated_and_dropped)
    worker.call("run", engine.store, 1, TOKENS)
    worker.call("run", surplus_downs)
    worker.call("run", every_method)
    worker.call("run", nonsense)
    worker.call("run", engine.close)
    pool.assert_nothing_leaks()


def constructed_again(child: Any) -> bool:
    """LMCache constructs the plugin a second time over the first: it is the same session."""
    manager = child.engine.storage_manager
    before = child.kept["backend"]
    manager.create_backends()
    after = manager.storage_backends["LocalCPUBackend"]
    assert after is not before and after._core is before._core
    before.close()
    return bool(after.get_stats()["connected"])


@pytest.mark.contract
def test_constructing_it_twice_is_harmless(pool: Pool) -> None:
    pool.start_holder(size="8MiB")
    worker = engine.start(pool)
    assert worker.call("run", constructed_again)
    worker.call("run", engine.store, 1, TOKENS)
    assert worker.call("run", engine.retrieve, 1, TOKENS) == (TOKENS, 0)
    assert sum(row.name.startswith("lmcache") for row in pool.statistics().sessions) == 1
    worker.call("run", engine.close)
    pool.assert_nothing_leaks()


def health(child: Any) -> list[bool]:
    from types import SimpleNamespace

    from lmcache.v1.health_monitor.base import HealthMonitor

    manager = SimpleNamespace(lmcache_engine=child.engine)
    checks = [each for each in HealthMonitor(manager).get_health_checks() if "VCache" in each.name()]
    return [check.check() for check in checks]


@pytest.mark.contract
def test_lmcaches_monitor_finds_our_health_check(pool: Pool) -> None:
    worker = engine.start(pool, size="4MiB")
    assert worker.call("run", health) == [True]
    pool.kill_server()
    eventually(lambda: worker.call("run", health) == [False], "the check fails")


def metrics(child: Any) -> str:
    from prometheus_client import generate_latest

    return generate_latest().decode()


def test_figures_are_among_lmcaches_metrics(pool: Pool) -> None:
    worker = engine.start(pool, size="4MiB")
    worker.call("run", engine.store, 1, TOKENS)
    lines = worker.call("run", metrics).splitlines()
    wanted = f'model_name="{engine.MODEL}"'
    assert any(
        "vcache_stored_bytes" in line and wanted in line and not line.endswith(" 0.0") for line in lines
    )
    assert any("vcache_connected" in line and line.endswith(" 1.0") for line in lines)
    assert all(any(f"vcache_{cause.value}{{" in line for line in lines) for cause in Cause)


def scheduler_looks(child: Any, path: str) -> int:
    """A query-only backend, as LMCache builds one in vLLM's scheduler."""
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.metadata import LMCacheMetadata

    from integration.lmcache_plugin import VCacheStorageBackend

    worker = child.engine.metadata
    metadata = LMCacheMetadata(
        model_name=worker.model_name,
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=worker.kv_dtype,
        kv_shape=worker.kv_shape,
        role="scheduler",
    )
    backend = VCacheStorageBackend("cpu", LMCacheEngineConfig.from_file(path), metadata, None, None)
    keys = _keys(child, 1)
    found = backend.batched_contains(keys, True)
    assert backend.allocate(engine.LAYERS, None) is None
    stats = backend.get_stats()
    assert stats["position"] == "query" and stats["pins"] == stats["held_chunks"] == 0
    backend.close()
    return int(found)


def test_in_the_scheduler_it_only_answers(pool: Pool) -> None:
    pool.start_holder(size="8MiB")
    worker = engine.start(pool)
    worker.call("run", engine.store, 1, TOKENS)
    path = str(pool.path.parent / f"lmcache-{worker.pid}.yaml")
    assert worker.call("run", scheduler_looks, path) == TOKENS // CHUNK
    worker.call("run", engine.close)
    pool.assert_nothing_leaks()


def burst(child: Any, count: int) -> tuple[int, int, int]:
    """Many lookups at once, and a store and a load beside them: (answers, hits, peak in flight)."""
    answers, names = child.kept["answers"], [f"lookup {number}" for number in range(count)]
    tokens = prompt(1, TOKENS)
    for name in names:
        child.engine.async_lookup_and_prefetch(name, tokens=tokens, pin=True)
    engine.store(child, 2, TOKENS)
    assert engine.retrieve(child, 2, TOKENS, "beside")[1] == 0
    hits = [answers.wait(name) for name in names]
    for name in names:
        child.engine.lookup_unpin(name)
    return (
        len(hits),
        sum(bool(each) for each in hits),
        child.kept["backend"].get_stats()["reads_in_flight_peak"],
    )


def test_a_burst_of_lookups_is_answered_at_once_and_bounded(pool: Pool) -> None:
    from vcache.limits import READS_IN_FLIGHT_MAX

    pool.start_holder(size="8MiB")
    worker = engine.start(pool, enable_async_loading=True)
    worker.call("run", engine.store, 1, TOKENS)
    answered, hits, peak = worker.call("run", burst, 2_000)
    assert answered == 2_000 and hits > 0
    assert 0 < peak <= READS_IN_FLIGHT_MAX
    stats = worker.call("run", engine.stats)
    assert stats["held_chunks"] == stats["promises"] == stats["reads_in_flight"] == stats["failures"] == 0
    worker.call("run", engine.close)
    pool.assert_nothing_leaks()


def left_to_a_base_class(child: Any) -> list[str]:
    """Methods of the backend that only raise, which LMCache's base classes do."""
    import inspect

    from integration.lmcache_plugin import VCacheStorageBackend

    methods = inspect.getmembers(VCacheStorageBackend, inspect.isfunction)
    return [name for name, method in methods if "raise NotImplementedError" in inspect.getsource(method)]


@pytest.mark.contract
def test_no_method_is_left_to_a_base_class_that_raises(pool: Pool) -> None:
    assert pool.start_worker().call("run", left_to_a_base_class) == []
