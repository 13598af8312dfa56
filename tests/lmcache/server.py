"""`lmcache server` on our L2 adapter, as a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from types import TracebackType
from typing import Any

from tests.processes.pool import ROOT, Pool
from tests.processes.worker import DEADLINE_S, eventually


def adapter_of(pool: Pool) -> str:
    """The L2 adapter's JSON, as on the command line of `lmcache server`."""
    params = {f"vcache.{field}": value for field, value in pool.client_config().items()}
    return json.dumps(
        {
            "type": "plugin",
            "module_path": "integration.lmcache_l2_adapter",
            "class_name": "VCacheL2Adapter",
            "adapter_params": {**params, "vcache.segment.size": 0},
        }
    )


START_S = 240.0
"""It imports for many seconds, and longer where something else computes."""


class LMCacheServer:
    """`with LMCacheServer(pool, chunk_tokens) as server:` started, but not waited for; killed at the end."""

    def __init__(self, pool: Pool, chunk_tokens: int) -> None:
        self._pool = pool
        ports = [str(_free_port()) for _ in range(3)]
        self.url = f"tcp://127.0.0.1:{ports[0]}"
        self._log = pool.path.parent / f"lmcache-server-{ports[0]}.log"
        self._status_url = f"http://127.0.0.1:{ports[1]}/status"
        self._command = [sys.executable, "-m", "lmcache.cli.main", "server", "--host", "127.0.0.1"]
        self._command += ["--port", ports[0], "--http-port", ports[1], "--prometheus-port", ports[2]]
        self._command += ["--chunk-size", str(chunk_tokens), "--l1-size-gb", "0.05", "--no-l1-use-lazy"]
        self._command += ["--eviction-policy", "LRU", "--l2-adapter", adapter_of(pool)]
        # By default it takes handles of a GPU's memory only; without a GPU the client copies.
        self._command += ["--supported-transfer-mode", "engine_driven"]

    def __enter__(self) -> LMCacheServer:
        environment = {
            **self._pool.environment(),
            "LMCACHE_TRACK_USAGE": "false",
            "LMCACHE_DISABLE_BANNER": "1",
        }
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=output
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait(DEADLINE_S)

    def wait_ready(self) -> None:
        """Until it answers."""
        eventually(self._answers, "lmcache server answers", START_S)

    def storage(self) -> dict[str, Any]:
        """What it says of its tiers."""
        with urllib.request.urlopen(self._status_url, timeout=DEADLINE_S) as answer:
            return dict(json.load(answer)["storage_manager"])

    def l1_objects(self) -> int:
        """How many chunks its L1 has."""
        return sum(int(l1["total_object_count"]) for l1 in self.storage()["l1_managers"].values())

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()[-3000:]
        with suppress(OSError):  # refused: it has not begun to listen
            return bool(self.storage())
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
