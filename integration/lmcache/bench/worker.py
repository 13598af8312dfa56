"""An LMCacheEngine that is told by lines of JSON what to do, and answers how long it took.

    python -m integration.lmcache.bench.worker CONFIG.yaml     (LMCache's own configuration file)

{"do": "store" | "retrieve" | "lookup" | …, "prompt": number} → {"seconds": …, "tokens": …}. The KV is
Llama-3-8B's: 32 layers, 8 heads of 128, bf16, paged per layer [K/V, slot, hidden] in host memory; it is the
same for every prompt and in every process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

import torch

LAYERS: Final = 32
HEADS: Final = 8
HEAD_SIZE: Final = 128
CHUNK_TOKENS: Final = 256
CHUNKS: Final = 8
TOKENS: Final = CHUNKS * CHUNK_TOKENS
BYTES: Final = TOKENS * LAYERS * 2 * HEADS * HEAD_SIZE * 2

_STORED_S: Final = 30.0
"""What is not there after that is not stored."""


def main() -> None:
    """Serve until standard input ends."""
    os.environ["LMCACHE_TRACK_USAGE"] = "false"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # LMCache logs to standard output
    subject = Subject(sys.argv[1])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        subject.select(asked["prompt"])
        begin = time.perf_counter()
        tokens = getattr(subject, asked["do"])()
        answer = {"seconds": time.perf_counter() - begin, "tokens": tokens}
        print(json.dumps(answer), file=answers, flush=True)
    subject.close()


class Subject:
    """One engine, its paged KV, and one prompt."""

    def __init__(self, path: str) -> None:
        from lmcache.v1.cache_engine import LMCacheEngineBuilder
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.metadata import LMCacheMetadata

        config = LMCacheEngineConfig.from_file(path)
        metadata = LMCacheMetadata(
            model_name="llama-3-8b",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(LAYERS, 2, config.chunk_size, HEADS, HEAD_SIZE),
            chunk_size=config.chunk_size,
            role="worker",
        )
        self._engine = LMCacheEngineBuilder.get_or_create(
            "bench", config, metadata, _connector(), lambda *_: None, lambda given, _: given
        )
        self._engine.post_init(async_lookup_server=None)
        self._backends = self._engine.storage_manager.storage_backends
        wanted = set(config.storage_plugins or ())
        if config.local_disk:
            wanted.add("LocalDiskBackend")
        if config.remote_url:
            wanted.add("RemoteBackend")
        if missing := wanted - set(self._backends):  # LMCache only logs it
            raise RuntimeError(f"LMCache did not load {missing}, only {set(self._backends)}")
        self._tokens: list[int] = []
        self._kvcaches = list(_content())
        self._given = {"kvcaches": self._kvcaches, "slot_mapping": torch.arange(TOKENS)}

    def select(self, prompt: int) -> None:
        """What is told next is about this prompt."""
        self._tokens = list(range(prompt * TOKENS, (prompt + 1) * TOKENS))

    def store(self) -> int:
        """Store the prompt; what a backend does behind the call counts, too."""
        self._engine.store(self._tokens, req_id="s", **self._given)
        keys = [key for _, _, key in self._engine.token_database.process_tokens(tokens=self._tokens)]
        until_s = time.monotonic() + _STORED_S
        for backend in self._backends.values():
            while any(backend.exists_in_put_tasks(key) for key in keys) and time.monotonic() < until_s:
                time.sleep(0.0005)
        while (tokens := self.lookup()) < TOKENS and time.monotonic() < until_s:  # not all say what they do
            time.sleep(0.0005)
        return tokens

    def retrieve(self) -> int:
        """Retrieve it; how many tokens were hit."""
        return int(self._engine.retrieve(self._tokens, req_id="r", **self._given).sum())

    def load_from_disk(self) -> int:
        """Have LocalDiskBackend read it, a chunk at a time, and copy it no further; how many tokens."""
        disk, loaded = self._backends["LocalDiskBackend"], 0
        for begin, end, key in self._engine.token_database.process_tokens(tokens=self._tokens):
            memory = disk.get_blocking(key)
            if memory is not None:
                memory.ref_count_down()
                loaded += end - begin
        return loaded

    def blank(self) -> int:
        """Empty the paged KV."""
        for layer in self._kvcaches:
            layer.zero_()
        return 0

    def verify(self) -> int:
        """Of how many tokens the paged KV is what it should be."""
        right = torch.ones(TOKENS, dtype=torch.bool)
        for layer, wanted in zip(self._kvcaches, _content(), strict=True):
            right &= (layer == wanted).all(-1).all(0)
        return int(right.sum())

    def lookup(self) -> int:
        """Look it up; how many tokens are there."""
        return int(self._engine.lookup(self._tokens))

    def clear(self) -> int:
        """Forget it, everywhere."""
        for backend in self._backends.values():
            for _, _, key in self._engine.token_database.process_tokens(tokens=self._tokens):
                backend.remove(key)
        return 0

    def forget_hot(self) -> int:
        """Empty LMCache's own CPU memory, so that the next load comes from behind it."""
        hot = self._backends.get("LocalCPUBackend")
        if hot is not None and type(hot).__name__ == "LocalCPUBackend":
            hot.clear()
        return 0

    def close(self) -> None:
        """End as LMCache does."""
        from lmcache.v1.cache_engine import LMCacheEngineBuilder

        LMCacheEngineBuilder.destroy("bench")


def _content() -> Iterator[torch.Tensor]:
    """The KV of every prompt, layer by layer."""
    random = torch.Generator().manual_seed(0)
    for _ in range(LAYERS):
        yield torch.rand(2, TOKENS, HEADS * HEAD_SIZE, generator=random).bfloat16()


def _connector() -> Any:
    from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface

    class HostConnector(GPUConnectorInterface):
        """Paged KV in host memory: a copy for each layer of a chunk, whatever memory the chunk is in."""

        def get_shape(self, num_tokens: int) -> torch.Size:
            return torch.Size([2, LAYERS, num_tokens, HEADS * HEAD_SIZE])

        def from_gpu(self, memory_obj: Any, start: int, end: int, **given: Any) -> None:
            for layer, tensor in enumerate(memory_obj.tensor.unbind(1)):
                tensor.copy_(given["kvcaches"][layer][:, start:end])

        def to_gpu(self, memory_obj: Any, start: int, end: int, **given: Any) -> None:
            for layer, tensor in enumerate(memory_obj.tensor.unbind(1)):
                given["kvcaches"][layer][:, start:end].copy_(tensor)

        def batched_from_gpu(self, memory_objs: Any, starts: Any, ends: Any, **given: Any) -> None:
            for memory, start, end in zip(memory_objs, starts, ends, strict=True):
                self.from_gpu(memory, start, end, **given)

        def batched_to_gpu(
            self, memory_objs: Any = None, starts: Any = None, ends: Any = None, **given: Any
        ) -> None:
            for memory, start, end in zip(memory_objs, starts, ends, strict=True):
                self.to_gpu(memory, start, end, **given)

    return HostConnector()


if __name__ == "__main__":
    main()
