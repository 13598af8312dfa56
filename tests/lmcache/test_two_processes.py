"""What one LMCacheEngine stores, another process' loads, bit for bit, out of the first one's segment."""

from __future__ import annotations

from typing import Any

import pytest

from tests.lmcache import engine
from tests.processes.content import prompt
from tests.processes.pool import Pool

TOKENS = 10 * engine.CHUNK_TOKENS


WAYS: dict[str, dict[str, Any]] = {
    "sync": {},
    "async": {"enable_async_loading": True},
    "layerwise": {"use_layerwise": True},
    "mla": {"metadata": {"use_mla": True}},
    "groups": {"groups": [2, 1]},
}


@pytest.mark.parametrize(
    "position", [pytest.param("primary", marks=pytest.mark.contract), "beside", "staged"]
)
@pytest.mark.parametrize("way", WAYS)
def test_one_stores_and_another_loads(pool: Pool, position: str, way: str) -> None:
    writer = engine.start(pool, position, size="8MiB", **WAYS[way])
    reader = engine.start(pool, position, **WAYS[way])
    assert reader.call("run", engine.retrieve, 1, TOKENS) == (0, 0)
    writer.call("run", engine.store, 1, TOKENS)
    assert reader.call("run", engine.retrieve, 1, TOKENS, "again") == (TOKENS, 0)
    # A prompt that goes on otherwise after four chunks.
    tokens = prompt(1, 4 * engine.CHUNK_TOKENS) + prompt(2, 4 * engine.CHUNK_TOKENS)
    assert reader.call("run", engine.retrieve_tokens, tokens, "part") == (4 * engine.CHUNK_TOKENS, 0)
    for worker in (writer, reader):
        stats = worker.call("run", engine.stats)
        assert stats["failures"] == 0 and stats["position"] == position
    assert reader.call("run", engine.stats)["hits"] > 0
    for worker in (reader, writer):
        worker.call("run", engine.close)
    pool.assert_nothing_leaks()
