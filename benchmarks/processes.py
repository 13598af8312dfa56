"""A private pool for a benchmark: server and holders in a directory of their own, which end with it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from benchmarks.report import ROOT
from vcache.client import Client
from vcache.config import Config, load
from vcache.limits import KIB
from vcache.segment import Segment

DEADLINE_S: Final = 30.0
"""Longer than any process here takes to be ready, even on a busy machine."""


class Pool:
    """`with Pool() as pool:` a runtime directory; what is started in it ends with the block.

    server: fields of the server's configuration, such as policy="s3fifo". The user's own VCACHE_* variables
    have no say here: a benchmark measures what its file says.
    """

    def __init__(self, **server: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vcb", dir="/dev/shm")
        self.folder = Path(self._folder.name)
        self.runtime = self.folder / "run"
        self._server_config = server
        self._processes: list[subprocess.Popen[bytes]] = []
        self.server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._folder.cleanup()

    def spawn(self, arguments: list[str], *, piped: bool = False) -> subprocess.Popen[bytes]:
        """Start a Python process in the project's root with the pool's environment."""
        environment = {name: text for name, text in os.environ.items() if not name.startswith("VCACHE_")}
        given = {f"VCACHE_SERVER_{name.upper()}": text for name, text in self._server_config.items()}
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**environment, **given, "VCACHE_LOG_LEVEL": "warning", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE if piped else None,
        )
        self._processes.append(process)
        return process

    # -- the server

    def start_server(self) -> float:
        """Start a metadata server; seconds until its session socket accepts."""
        options = ["--runtime-dir", str(self.runtime)]
        begin = time.perf_counter()
        self.server = self.spawn(["-m", "metadata_server.server", *options])
        while not self._accepts():
            if self.server.poll() is not None:
                raise RuntimeError(f"the server ended with {self.server.returncode}")
            if time.perf_counter() - begin > DEADLINE_S:
                raise RuntimeError(f"the server was not ready within {DEADLINE_S:g} s")
            time.sleep(0.001)
        return time.perf_counter() - begin

    def _accepts(self) -> bool:
        refused = FileNotFoundError, ConnectionRefusedError  # not bound yet, not listening yet
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe, suppress(*refused):
            probe.connect(str(self.runtime / "session.sock"))
            return True
        return False

    def kill_server(self) -> None:
        """SIGKILL the server and wait until it is gone; what it left behind stays."""
        assert self.server is not None
        self.server.kill()
        self.server.wait()

    def server_memory(self) -> int:
        """Bytes of memory that are the server's own, its table included."""
        assert self.server is not None
        status = Path(f"/proc/{self.server.pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in status)
        return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * KIB

    # -- who uses it

    def start_holder(self, device: str, size: int) -> None:
        """Start a process that holds a segment of `size` bytes; returns when it is lent."""
        options = ["--device", device, "--size", str(size), "--runtime-dir", str(self.runtime), "--json"]
        process = self.spawn(["-m", "vcache.cli", "segment", *options], piped=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the holder of {device} ended with {process.wait()}")
        json.loads(line)

    def config(self, **overrides: Any) -> Config:
        """Configuration of who uses the pool: no autostart, and patience, so that no figure is of a miss."""
        given: dict[str, Any] = {
            "runtime_dir": str(self.runtime),
            "server.autostart": False,
            "client.request_timeout_ms": 10_000,
            **overrides,
        }
        return load(environ={}, **given).config

    def client(self, new_segment: Callable[[], Segment] | None = None, **overrides: Any) -> Client:
        """A connected client, to be closed by the caller; it lends what `new_segment` makes."""
        client = Client(self.config(**overrides), name="benchmark", new_segment=new_segment)
        if not client.wait_connected(DEADLINE_S):
            client.close()
            raise RuntimeError(f"no connection to the server within {DEADLINE_S:g} s")
        return client
