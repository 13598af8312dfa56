"""KV through the wire protocol of `lmcache server`: LMCache's own client for vLLM, scheduler's and worker's
half, in processes of their own; what the server's L1 has lost comes back out of the pool.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.lmcache.server import START_S, LMCacheServer
from tests.processes.content import kv_of_tokens, prompt
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S, Worker, eventually
from vcache.layout import KVLayout

LAYERS, HEADS, HEAD_SIZE, PAGE_TOKENS, CHUNK_TOKENS = 3, 2, 16, 8, 16
CHUNKS = 6
TOKENS = CHUNKS * CHUNK_TOKENS
PAGES = 2 * TOKENS // PAGE_TOKENS
MODEL = "wire-model"
LAYOUT = KVLayout(
    num_layers=LAYERS, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype="float32", chunk_tokens=CHUNK_TOKENS
)


class Client:
    """What vLLM's connector for `lmcache server` has in a scheduler and in a worker, and paged KV."""

    def __init__(self, url: str) -> None:
        import os

        os.environ["LMCACHE_TRACK_USAGE"] = "false"
        import zmq
        from lmcache.integration.vllm.vllm_multi_process_adapter import (
            LMCacheMPSchedulerAdapter,
            LMCacheMPWorkerAdapter,
            ParallelStrategy,
        )

        self._context = zmq.Context()
        alone = ParallelStrategy(
            mla_only=False, vllm_world_size=1, vllm_worker_id=0, tp_size=1, pp_size=1, n_servers=1
        )
        given = (self._context, MODEL, PAGE_TOKENS, alone)
        self.scheduler = LMCacheMPSchedulerAdapter([url], *given, mq_timeout=DEADLINE_S)
        self.worker = LMCacheMPWorkerAdapter(url, *given, mq_timeout=DEADLINE_S)
        self.paged = {
            f"layer.{layer}": torch.zeros(2, PAGES, PAGE_TOKENS, HEADS, HEAD_SIZE) for layer in range(LAYERS)
        }
        self.worker.register_kv_caches(self.paged, layout_hints={"kv_layout": "NHD"})
        self._requests = 0

    def _operation(self, tokens: list[int], count: int) -> tuple[str, Any, list[int]]:
        """A request's name, its operation on scattered pages, and those pages."""
        from lmcache.integration.vllm.vllm_multi_process_adapter import LoadStoreOp

        self._requests += 1
        pages = torch.randperm(PAGES)[: count // PAGE_TOKENS].tolist()
        return f"request {self._requests}", LoadStoreOp(tokens, [pages], 0, count), pages

    def _kv(self, pages: list[int]) -> torch.Tensor:
        """The words of those pages: [layer, K/V, token, head, head_size]."""
        layers = [layer[:, pages].reshape(2, -1, HEADS, HEAD_SIZE) for layer in self.paged.values()]
        return torch.stack(layers).view(torch.int32)

    def store(self, tokens: list[int]) -> None:
        """Have the KV of these tokens stored, and wait until it is."""
        name, operation, pages = self._operation(tokens, len(tokens))
        words = kv_of_tokens(tokens, LAYOUT)
        for layer, paged in enumerate(self.paged.values()):
            paged.view(torch.int32)[:, pages] = words[layer].reshape(
                2, len(pages), PAGE_TOKENS, HEADS, HEAD_SIZE
            )
        self.worker.submit_store_request(name, operation, self.worker.create_recorded_event())
        eventually(lambda: self.worker.get_finished({name})[0], "the store is done")
        assert not self.worker.get_failed_store_requests()
        self.scheduler.end_session(name)

    def load(self, tokens: list[int]) -> tuple[int, int]:
        """(tokens that the lookup found, tokens among them that were loaded with wrong bytes)."""
        self._requests += 1
        name = f"request {self._requests}"
        self.scheduler.maybe_submit_lookup_request(name, tokens)
        eventually(lambda: self.scheduler.check_lookup_result(name) is not None, "the lookup is done")
        hit = self.scheduler.check_lookup_result(name)
        wrong = self._retrieve(name, tokens, hit) if hit else 0
        self.scheduler.cleanup_lookup_result(name)
        self.scheduler.end_session(name)
        return hit, wrong

    def _retrieve(self, name: str, tokens: list[int], hit: int) -> int:
        _, operation, pages = self._operation(tokens, hit)
        for paged in self.paged.values():
            paged[:, pages] = torch.nan
        self.worker.submit_retrieve_request(name, operation, self.worker.create_recorded_event())
        eventually(lambda: self.worker.get_finished(set())[1], "the load is done")
        assert not self.worker.get_failed_request_ids()
        right = (self._kv(pages) == kv_of_tokens(tokens[:hit], LAYOUT)).all(-1).all(-1).all(0).all(0)
        return int((~right).sum())

    def close(self) -> None:
        """Leave the server."""
        self.worker.shutdown()
        self.scheduler.shutdown()
        self._context.term()


def connect(child: Any, url: str) -> None:
    child.kept["client"] = Client(url)


def store(child: Any, tokens: list[int]) -> None:
    child.kept["client"].store(tokens)


def load(child: Any, tokens: list[int]) -> tuple[int, int]:
    found: tuple[int, int] = child.kept["client"].load(tokens)
    return found


def clear_l1(child: Any) -> None:
    assert child.kept["client"].scheduler.reset_cache()


def disconnect(child: Any) -> None:
    child.kept.pop("client").close()


def client_of(pool: Pool, server: LMCacheServer) -> Worker:
    worker = pool.start_worker()
    worker.call("run", connect, server.url)
    return worker


def stored(pool: Pool, writer: Worker, seed: int) -> list[int]:
    """A prompt that was stored over the wire, when it has reached the pool."""
    before = pool.counters().get("committed", 0)
    tokens = prompt(seed, TOKENS)
    writer.call("run", store, tokens)
    pool.eventually(
        lambda pool: pool.counters().get("committed", 0) == before + CHUNKS, "all of it is in the pool"
    )
    return tokens


def empty_l1(server: LMCacheServer, worker: Worker) -> None:
    """What a store that is just ending has locked stays a moment longer."""

    def empty() -> bool:
        worker.call("run", clear_l1)
        return server.l1_objects() == 0

    eventually(empty, "L1 is empty")


@pytest.mark.timeout(2 * START_S)
def test_kv_comes_back_after_l1_was_cleared_and_in_another_server(pool: Pool) -> None:
    pool.start_holder(size="8MiB")
    with LMCacheServer(pool, CHUNK_TOKENS) as another:
        with LMCacheServer(pool, CHUNK_TOKENS) as server:
            server.wait_ready()
            assert any(row.name.startswith("lmcache-mp") for row in pool.statistics().sessions)
            writer, reader = client_of(pool, server), client_of(pool, server)
            tokens = stored(pool, writer, 1)
            assert server.l1_objects() == CHUNKS
            empty_l1(server, writer)
            assert reader.call("run", load, tokens) == (TOKENS, 0)
            # A prompt that goes on otherwise after four chunks.
            empty_l1(server, writer)
            other = tokens[: 4 * CHUNK_TOKENS] + prompt(2, 2 * CHUNK_TOKENS)
            assert reader.call("run", load, other) == (4 * CHUNK_TOKENS, 0)
            (adapter,) = server.storage()["l2_adapters"]
            assert adapter["type"] == "VCacheL2Adapter" and adapter["is_healthy"] and not adapter["failures"]
            assert adapter["hits"] >= CHUNKS + 4
            for worker in (writer, reader):
                worker.call("run", disconnect)
        # That server is killed; another one has what it stored.
        another.wait_ready()
        reader = client_of(pool, another)
        assert another.l1_objects() == 0
        assert reader.call("run", load, tokens) == (TOKENS, 0)
        # Without the pool there would be nothing.
        empty_l1(another, reader)
        pool.observer.clear()
        assert reader.call("run", load, tokens) == (0, 0)
        reader.call("run", disconnect)
    pool.assert_nothing_leaks()
