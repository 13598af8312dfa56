"""A real LMCacheEngine on VCache, in a worker process: what a test tells it to do, and what it checks."""

from __future__ import annotations

import threading
from typing import Any

import torch
import yaml

from tests.lmcache.paged import Paged, Shape
from tests.processes.content import prompt
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S, Worker

LAYERS, HEADS, HEAD_SIZE, CHUNK_TOKENS = 3, 2, 8, 16
SLOTS = 1024
MODEL = "test-model"

POSITIONS = {
    "primary": {"local_cpu": False, "max_local_cpu_size": 0, "storage_plugins": ["LocalCPUBackend"]},
    "beside": {"local_cpu": False, "max_local_cpu_size": 0.05, "storage_plugins": ["vcache"]},
    "staged": {"local_cpu": True, "max_local_cpu_size": 0.05, "storage_plugins": ["vcache"]},
}


def config_of(pool: Pool, position: str, *, size: int | str = 0, **given: Any) -> dict[str, Any]:
    """LMCache's configuration, as its YAML file has it. given: dotted names are of `extra_config`."""
    base = POSITIONS[position]
    name = base["storage_plugins"][0]
    extra = {
        f"storage_plugin.{name}.module_path": "integration.lmcache_plugin",
        f"storage_plugin.{name}.class_name": "VCacheStorageBackend",
        **{f"vcache.{field}": value for field, value in pool.client_config().items()},
        "vcache.segment.size": size,
        **{field: value for field, value in given.items() if "." in field},
    }
    plain = {field: value for field, value in given.items() if "." not in field}
    return {"chunk_size": CHUNK_TOKENS, **base, **plain, "extra_config": extra}


def start(pool: Pool, position: str = "primary", **given: Any) -> Worker:
    """A worker with an LMCacheEngine; keywords as `start_in`."""
    worker = pool.start_worker()
    start_in(worker, pool, position, **given)
    return worker


def start_in(worker: Worker, pool: Pool, position: str, **given: Any) -> None:
    """An LMCacheEngine in a worker that has none; keywords: `metadata` for its metadata, `groups` of layers,
    `kv` where its paged KV is ("cpu", "cuda:0"), others as `config_of`.
    """
    metadata, groups, kv = given.pop("metadata", {}), given.pop("groups", None), given.pop("kv", "cpu")
    path = pool.path.parent / f"lmcache-{worker.pid}.yaml"
    path.write_text(yaml.safe_dump(config_of(pool, position, **given)))
    worker.call("run", open_engine, str(path), metadata, groups, kv)


# -- in the worker


def open_engine(
    child: Any, path: str, metadata: dict[str, Any], groups: list[int] | None, kv: str = "cpu"
) -> None:
    """An engine as LMCache builds one, with our connector to KV in host memory, or with its own to a GPU."""
    import os

    os.environ["LMCACHE_TRACK_USAGE"] = "false"
    from lmcache.v1.cache_engine import LMCacheEngineBuilder
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.metadata import LMCacheMetadata

    from tests.lmcache.connector import connector_of

    config = LMCacheEngineConfig.from_file(path)
    mla = bool(metadata.get("use_mla"))
    parts, heads, size = (1, 1, HEADS * HEAD_SIZE) if mla else (2, HEADS, HEAD_SIZE)
    child.kept["shape"] = shape = Shape(kv, LAYERS, parts, heads, size, SLOTS)
    child.kept["kvcaches"] = None if kv == "cpu" else shape.empty()
    described = LMCacheMetadata(
        **{
            "model_name": MODEL,
            "world_size": 1,
            "local_world_size": 1,
            "worker_id": 0,
            "local_worker_id": 0,
            "kv_dtype": torch.float32,
            "kv_shape": (LAYERS, parts, CHUNK_TOKENS, heads, size),
            "chunk_size": CHUNK_TOKENS,
            "role": "worker",
            **metadata,
        }
    )
    if groups is not None:
        described.kv_layer_groups_manager = _Groups(groups, parts, heads * size)
    connector = connector_of(config, described, shape)
    child.engine = LMCacheEngineBuilder.get_or_create(
        "test", config, described, connector, lambda *_: None, lambda given, _: given
    )
    child.kept["answers"] = answers = _Answers()
    child.engine.post_init(async_lookup_server=answers)
    backends = child.engine.storage_manager.storage_backends
    child.kept["backend"] = backend = backends[config.storage_plugins[0]]
    assert type(backend).__name__ == "VCacheStorageBackend", (
        "LMCache lost our backend, and said so in its log"
    )


class _Groups:
    """What LMCache knows of groups of layers that are not alike: how many layers each has."""

    def __init__(self, layers: list[int], parts: int, hidden: int) -> None:
        from types import SimpleNamespace as Made

        self.kernel_groups = [
            Made(
                num_layers=count, dtype=torch.float32, hidden_dim_size=hidden, shape_desc=Made(kv_size=parts)
            )
            for count in layers
        ]
        self.num_kernel_groups = self.num_groups = len(layers)
        self.kv_layer_groups = self.kernel_groups  # its name before 0.5


class _Answers:
    """What the scheduler would be told about asynchronous lookups."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tokens: dict[str, int] = {}

    def send_response_to_scheduler(self, lookup_id: str, tokens: int) -> None:
        with self._changed:
            self._tokens[lookup_id] = tokens
            self._changed.notify_all()

    def wait(self, lookup_id: str) -> int:
        with self._changed:
            assert self._changed.wait_for(lambda: lookup_id in self._tokens, DEADLINE_S)
            return self._tokens[lookup_id]


def paged_of(child: Any, tokens: list[int]) -> Paged:
    """Places for these tokens in the engine's paged KV, emptied; in host memory several threads may ask."""
    return Paged(child.kept["shape"], tokens, child.kept["kvcaches"])


def store(child: Any, seed: int, count: int) -> None:
    """Store a prompt."""
    store_tokens(child, prompt(seed, count))


def store_tokens(child: Any, tokens: list[int]) -> None:
    paged = paged_of(child, tokens).fill()
    if child.engine.use_layerwise:
        for _ in child.engine.store_layer(tokens, req_id="store", **paged.given()):
            pass
    else:
        child.engine.store(tokens, req_id="store", **paged.given())


def lookup(child: Any, seed: int, count: int, pin: str = "") -> int:
    """The prefix hit in tokens; pin: the lookup's name, under which it is pinned."""
    tokens = prompt(seed, count)
    return int(child.engine.lookup(tokens, lookup_id=pin or None, pin=bool(pin)))


def retrieve(child: Any, seed: int, count: int, name: str = "r") -> tuple[int, int]:
    """(tokens hit, tokens among them with wrong bytes)."""
    return retrieve_tokens(child, prompt(seed, count), name)


def retrieve_tokens(child: Any, tokens: list[int], name: str = "r") -> tuple[int, int]:
    engine = child.engine
    paged = paged_of(child, tokens)
    if engine.async_loading:
        engine.async_lookup_and_prefetch(name, tokens=tokens, pin=True)
        answer = child.kept["answers"].wait(name)
        if not answer:
            return 0, 0
        mask = engine.retrieve(tokens, req_id=name, **paged.given())
        assert int(mask.sum()) == answer
    elif engine.use_layerwise:
        if not engine.lookup(tokens):  # LMCache fails where nothing is there
            return 0, 0
        *_, mask = engine.retrieve_layer(tokens, req_id=name, **paged.given())
    else:
        mask = engine.retrieve(tokens, req_id=name, **paged.given())
    return int(mask.sum()), paged.wrong(mask)


def unpin(child: Any, name: str) -> None:
    child.engine.lookup_unpin(name)


def clear(child: Any, tokens: list[int] | None = None) -> int:
    return int(child.engine.clear(tokens))


def stats(child: Any) -> dict[str, Any]:
    """Of our backend."""
    return dict(child.kept["backend"].get_stats())


def close(child: Any) -> None:
    """End the engine as LMCache does."""
    from lmcache.v1.cache_engine import LMCacheEngineBuilder

    LMCacheEngineBuilder.destroy("test")
    child.engine = None
