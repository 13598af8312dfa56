"""LMCache's own CUDA connector over the pool: synthetic paged KV on a GPU, in all positions, with the pool on
the GPU or in the host. Run with -m gpu, where LMCache is installed with all that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from tests.processes.content import prompt
from tests.processes.pool import Pool
from tests.processes.worker import Worker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("lmcache") is None, reason="LMCache is not installed"),
]

GPU = "cuda:0"
WAYS: dict[str, dict[str, Any]] = {
    "sync": {},
    "async": {"enable_async_loading": True},
    "layerwise": {"use_layerwise": True},
    "mla": {"metadata": {"use_mla": True}},
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool() as pool:
        pool.start_server()
        yield pool


@pytest.fixture(scope="module")
def workers(pool: Pool) -> list[Worker]:
    """A writer and a reader. LMCache takes seconds to import, so all tests have the same two."""
    return [pool.start_worker(), pool.start_worker()]


def kinds_of_memory(pool: Pool) -> set[str]:
    """Of the segments that are lent now."""
    return {row.device.partition(":")[0] for row in pool.statistics().segments if row.held}


@pytest.mark.parametrize("memory", [GPU, "shm:0"])
@pytest.mark.parametrize("position", ["primary", "beside", "staged"])
@pytest.mark.parametrize("way", WAYS)
def test_one_stores_and_another_loads(
    pool: Pool, workers: list[Worker], way: str, position: str, memory: str
) -> None:
    from tests.lmcache import engine

    chunk = engine.CHUNK_TOKENS
    # The last chunk is not whole: LMCache's kernel then reads and writes our memory itself.
    whole, tokens = 10 * chunk, 10 * chunk + 5
    given = {**WAYS[way], "kv": GPU, "vcache.device": memory, "save_unfull_chunk": True}
    writer, reader = workers
    pool.eventually(lambda pool: not kinds_of_memory(pool), "the last test's segment has gone")
    engine.start_in(writer, pool, position, size="8MiB", **given)
    engine.start_in(reader, pool, position, **given)
    assert reader.call("run", engine.retrieve, 1, tokens) == (0, 0)
    writer.call("run", engine.store, 1, tokens)
    assert reader.call("run", engine.retrieve, 1, tokens, "again") == (tokens, 0)
    other = prompt(1, 4 * chunk) + prompt(2, 4 * chunk)
    assert reader.call("run", engine.retrieve_tokens, other, "part") == (4 * chunk, 0)
    reader.call("run", engine.store, 3, whole)  # into the other process' segment
    assert writer.call("run", engine.retrieve, 3, whole, "back") == (whole, 0)
    for worker in workers:
        stats = worker.call("run", engine.stats)
        assert stats["failures"] == 0 and stats["position"] == position and stats["hits"] > 0
    assert kinds_of_memory(pool) == {memory.partition(":")[0]}
    for worker in (reader, writer):
        worker.call("run", engine.close)
    pool.assert_nothing_leaks()


@pytest.mark.parametrize("way", ["sync", "layerwise"])
def test_what_is_loaded_is_right_while_others_overwrite_the_pool(
    pool: Pool, workers: list[Worker], way: str
) -> None:
    """LMCache lets go of layers whose copies it has only launched: they must stay until those are over."""
    from tests.lmcache import engine

    given = {**WAYS[way], "kv": GPU, "vcache.device": GPU}
    writer, reader = workers
    engine.start_in(writer, pool, "primary", size="2MiB", **given)
    engine.start_in(reader, pool, "primary", **given)
    tokens = 40 * engine.CHUNK_TOKENS
    for seed in range(50):
        writer.call("run", engine.store, seed, tokens)
        writer.send("run", engine.store, seed + 1000, tokens)
        hit, wrong = reader.call("run", engine.retrieve, seed, tokens, f"load {seed}")
        writer.result()
        assert wrong == 0, f"{wrong} of {hit} tokens"
    for worker in (reader, writer):
        assert worker.call("run", engine.stats)["failures"] == 0
        worker.call("run", engine.close)
    pool.assert_nothing_leaks()
