"""Who takes part in `benchmarks.lmcache_backends`: LMCacheEngines in processes of their own, and the stores
that they need around them; what is not installed is left out, and said.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks.processes import DEADLINE_S, Pool
from benchmarks.report import ROOT
from integration.lmcache.bench.worker import BYTES, CHUNKS, TOKENS

LIMIT: Final = "LocalCPUBackend, own process"
PRIMARY: Final = "VCache primary"
LOOKUPS: Final = 30
"""In a round, of which the median counts."""

_OURS: Final = {
    PRIMARY: {"local_cpu": False, "max_local_cpu_size": 0, "storage_plugins": ["LocalCPUBackend"]},
    "VCache beside": {"local_cpu": False, "max_local_cpu_size": 0.6, "storage_plugins": ["vcache"]},
    "VCache staged": {"local_cpu": True, "max_local_cpu_size": 0.6, "storage_plugins": ["vcache"]},
}
_BEHIND_CPU: Final = {"local_cpu": False, "max_local_cpu_size": 0.6}
"""LMCache's disk and remote backends need memory of its CPU backend, as bounce buffers."""


class Worker:
    """A process with an LMCacheEngine; all of them start side by side, for they import for seconds."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        path = folder / f"{name.replace(' ', '-').replace('/', '-')}.yaml"
        path.write_text(yaml.safe_dump({"chunk_size": TOKENS // CHUNKS, **config}))
        command = [sys.executable, "-m", "integration.lmcache.bench.worker", str(path)]
        self._log = (folder / f"{path.stem}.log").open("wb")
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # or two of them hash the same tokens differently
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._is_ready = False

    def do(self, what: str, prompt: int, tokens: int | None = None) -> float:
        """Have it done; seconds. RuntimeError if it was not done with so many tokens."""
        if not self._is_ready:
            self._answer()
            self._is_ready = True
        assert self._process.stdin is not None
        print(json.dumps({"do": what, "prompt": prompt}), file=self._process.stdin, flush=True)
        answer = self._answer()
        if tokens is not None and answer["tokens"] != tokens:
            raise RuntimeError(f"{what}: {answer['tokens']} tokens, wanted {tokens}\n{self._said()}")
        return float(answer["seconds"])

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended\n{self._said()}")
        return dict(json.loads(line))

    def _said(self) -> str:
        return Path(self._log.name).read_text(errors="replace")[-2000:]


class Contestant:
    """Who stores, and who loads: perhaps the same. The rounds' seconds: stores, retrieves, lookups.

    flush: forgets what LMCache cannot remove from the store behind it.
    """

    def __init__(
        self, name: str, writer: Worker, reader: Worker, flush: Callable[[], None] = lambda: None
    ) -> None:
        self.name = name
        self._writer = writer
        self._reader = reader
        self._flush = flush
        self.stores: list[float] = []
        self.retrieves: list[float] = []
        self.lookups: list[float] = []

    def warm_up(self) -> None:
        """A round that does not count: maps, populates, imports. RuntimeError if other bytes come back."""
        self._store(0)
        self._reader.do("blank", 0)
        self._reader.do("retrieve", 0, TOKENS)
        self._reader.do("verify", 0, TOKENS)
        self._forget(0)

    def round(self, prompt: int) -> None:
        """Store a prompt that was not there, look it up, and load it."""
        self.stores.append(self._store(prompt))
        looked = [self._reader.do("lookup", prompt, TOKENS) for _ in range(LOOKUPS)]
        self.lookups.append(statistics.median(looked))
        self.retrieves.append(self._reader.do("retrieve", prompt, TOKENS))
        self._forget(prompt)

    def _store(self, prompt: int) -> float:
        taken = self._writer.do("store", prompt, TOKENS)
        if self.name != LIMIT:  # what the CPU backend kept by the way is not what is measured
            self._reader.do("forget_hot", prompt)
        return taken

    def _forget(self, prompt: int) -> None:
        self._reader.do("forget_hot", prompt)
        self._writer.do("clear", prompt)
        self._flush()


class Contest:
    """All that can take part here, in processes that end with `ending`. left_out: the others, and why."""

    def __init__(self, pool: Pool, ending: ExitStack) -> None:
        self._pool = pool
        self._ending = ending
        self.left_out: dict[str, str] = {}

    def contestants(self) -> Iterator[Contestant]:
        """Ours, the limit, then LMCache's other backends."""
        for name, config in _OURS.items():
            yield self._two(name, {**config, "extra_config": self._extra(str(config["storage_plugins"][0]))})  # type: ignore[index]
        yield self._one(LIMIT, {"local_cpu": True, "max_local_cpu_size": 0.6})
        # It counts what was removed as if it were there.
        disk = {"local_disk": f"file://{self._pool.folder}/disk", "max_local_disk_size": 64}
        yield self._one("LocalDiskBackend (on tmpfs), own process", {**_BEHIND_CPU, **disk})
        yield from self._redis()
        yield from self._mooncake()

    def _extra(self, plugin: str) -> dict[str, Any]:
        return {
            f"storage_plugin.{plugin}.module_path": "integration.lmcache_plugin",
            f"storage_plugin.{plugin}.class_name": "VCacheStorageBackend",
            "vcache.runtime_dir": str(self._pool.runtime),
            "vcache.server.autostart": False,
            "vcache.client.request_timeout_ms": 10_000,
            "vcache.segment.size": 0,
        }

    def _redis(self) -> Iterator[Contestant]:
        name = "RemoteBackend to Redis"
        if shutil.which("redis-server") is None:
            self.left_out[name] = "no redis-server here (Debian: redis-server)"
            return
        port = _free_port()
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
        server = subprocess.Popen(command, cwd=self._pool.folder, stdout=subprocess.DEVNULL)
        self._ending.callback(server.wait)
        self._ending.callback(server.kill)
        _wait_for(port)
        # Not resp://, LMCache's native client: it hangs where a lookup comes while a store is under way.
        config = {**_BEHIND_CPU, "remote_url": f"redis://127.0.0.1:{port}", "save_unfull_chunk": False}
        own = self._worker(name, config)
        yield Contestant(name, own, own, partial(_flush, port))

    def _mooncake(self) -> Iterator[Contestant]:
        name = "RemoteBackend to Mooncake"
        if find_spec("mooncake") is None:
            self.left_out[name] = "no Mooncake here (pip install mooncake-transfer-engine-non-cuda)"
            return
        from vcache.tiers.mooncake.master import Master

        master = self._ending.enter_context(Master(lease_s=1.0))
        common = {
            **_BEHIND_CPU,
            "remote_url": f"mooncakestore://{master.address}/",
            "save_unfull_chunk": False,
        }
        settings = {
            "local_hostname": master.host,
            "metadata_server": master.metadata,
            "protocol": "tcp",
            "master_server_address": master.address,
            "mooncake_master_server_addr": master.address,  # as newer wheels call it
            "transfer_timeout": 10,
            "save_chunk_meta": False,
        }
        lends, borrows = ({"global_segment_size": size} for size in (12 * BYTES, 0))
        writer = self._worker(f"{name} writer", {**common, "extra_config": {**settings, **lends}})
        reader = self._worker(f"{name} reader", {**common, "extra_config": {**settings, **borrows}})
        yield Contestant(name, writer, reader)

    def _one(self, name: str, config: dict[str, Any]) -> Contestant:
        own = self._worker(name, config)
        return Contestant(name, own, own)

    def _two(self, name: str, config: dict[str, Any]) -> Contestant:
        return Contestant(
            name, self._worker(f"{name} writer", config), self._worker(f"{name} reader", config)
        )

    def _worker(self, name: str, config: dict[str, Any]) -> Worker:
        made = Worker(self._pool.folder, name, config)
        self._ending.callback(made.end)
        return made


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _flush(port: int) -> None:
    """Empty a Redis."""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as connection:
        connection.sendall(b"FLUSHALL\r\n")
        if not connection.recv(64).startswith(b"+OK"):
            raise RuntimeError("Redis does not forget")


def _wait_for(port: int) -> None:
    """Until something answers there."""
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.02)
