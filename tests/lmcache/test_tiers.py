"""The lower tiers under LMCache are ours: what the pool lost another process loads from the local SSD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.lmcache import engine
from tests.processes.pool import Pool
from tests.processes.worker import Worker, eventually

pytest.importorskip("rocksdict", reason="the local tier is not installed")

TOKENS = 10 * engine.CHUNK_TOKENS
WAYS: dict[str, dict[str, Any]] = {
    "sync": {},
    "async": {"enable_async_loading": True},
    "layerwise": {"use_layerwise": True},
}


def start(pool: Pool, position: str, directory: Path, way: str) -> Worker:
    tiers = {"vcache.tiers.order": "rocksdb", "vcache.tiers.rocksdb.directory": str(directory)}
    return engine.start(pool, position, **WAYS[way], **tiers)


def lookup_and_retrieve(worker: Worker) -> tuple[int, tuple[int, int]]:
    return worker.call("run", engine.lookup, 1, TOKENS), worker.call("run", engine.retrieve, 1, TOKENS, "r")


@pytest.mark.parametrize(("position", "way"), [*(("primary", way) for way in WAYS), ("staged", "sync")])
def test_what_the_pool_lost_is_loaded_from_below(pool: Pool, tmp_path: Path, position: str, way: str) -> None:
    pool.start_holder(size="8MiB")
    writer, reader = (start(pool, position, tmp_path / "tier", way) for _ in range(2))
    writer.call("run", engine.store, 1, TOKENS)
    eventually(lambda: not writer.call("run", engine.stats)["tier_waiting_chunks"], "it is written below")
    pool.observer.clear()
    assert lookup_and_retrieve(reader) == (TOKENS, (TOKENS, 0))
    assert reader.call("run", engine.stats)["tier_promoted_chunks"] == TOKENS // engine.CHUNK_TOKENS
    for worker in (writer, reader):
        assert worker.call("run", engine.stats)["failures"] == 0
        worker.call("run", engine.close)
    pool.assert_nothing_leaks()


def test_another_pool_finds_it_there(pool: Pool, tmp_path: Path) -> None:
    pool.start_holder(size="8MiB")
    writer = start(pool, "primary", tmp_path / "tier", "sync")
    writer.call("run", engine.store, 1, TOKENS)
    eventually(lambda: not writer.call("run", engine.stats)["tier_waiting_chunks"], "it is written below")
    writer.call("run", engine.close)
    with Pool() as later:
        later.start_server()
        later.start_holder(size="8MiB")
        reader = start(later, "primary", tmp_path / "tier", "sync")
        assert lookup_and_retrieve(reader) == (TOKENS, (TOKENS, 0))
        assert reader.call("run", engine.clear) == TOKENS  # below, too
        assert lookup_and_retrieve(reader) == (0, (0, 0))
        reader.call("run", engine.close)
        later.assert_nothing_leaks()
