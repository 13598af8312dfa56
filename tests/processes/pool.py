"""A pool of real processes in a directory of its own: server, holders, workers; everything ends with the
test.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tests.processes.devices import device_of, size_on
from tests.processes.worker import DEADLINE_S, Worker, all_stopped, eventually
from vcache.client import Client
from vcache.config import load
from vcache.errors import ServerError, Unavailable
from vcache.protocol import Statistics

ROOT = Path(__file__).parents[2]

_RIGHTS_END_S = 15.0
"""Rights that nobody uses end long before: leases after their time, the others' at the next declaration."""


class Pool:
    """`with Pool() as pool:` a runtime directory, and processes that use it."""

    large = False
    """Whether its engines have large chunks."""

    def __init__(self, **server: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vct", dir="/dev/shm")
        self.path = Path(self._folder.name) / "run"
        self.server_config = server
        self.server: subprocess.Popen[bytes] | None = None
        self.holders: list[subprocess.Popen[bytes]] = []
        self.workers: list[Worker] = []
        self._observer: Client | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._observer is not None:
            self._observer.close()
        for worker in self.workers:
            worker.kill()
        for process in (*self.holders, self.server):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait(DEADLINE_S)
            if process is not None and process.stdout is not None:
                process.stdout.close()
        self._folder.cleanup()

    # -- processes

    def launch_server(self, *options: str) -> subprocess.Popen[bytes]:
        """Start a metadata server; it is not waited for."""
        command = [sys.executable, "-m", "metadata_server.server", "--runtime-dir", str(self.path), *options]
        self.server = subprocess.Popen(command, cwd=ROOT, env=self.environment())
        return self.server

    def start_server(self, *options: str) -> subprocess.Popen[bytes]:
        """Start a metadata server and wait until it answers."""
        server = self.launch_server(*options)
        # By its process: the observer may take a moment to notice that an earlier one has gone.
        eventually(
            lambda: self.serving_pid() == server.pid or server.poll() is not None, "the server comes up"
        )
        assert server.poll() is None, f"the server ended with {server.returncode}"
        return server

    def kill_server(self) -> None:
        """SIGKILL the server and wait until it is gone."""
        assert self.server is not None
        self.server.kill()
        self.server.wait(DEADLINE_S)

    @contextmanager
    def server_stopped(self) -> Iterator[None]:
        """The server under SIGSTOP; it sleeps before the block begins."""
        assert self.server is not None
        pid = self.server.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            eventually(lambda: all_stopped(pid), "the server stops")
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def environment(self) -> dict[str, str]:
        """Of child processes: the tests' own, and the server's configuration."""
        given = {f"VCACHE_SERVER_{name.upper()}": str(value) for name, value in self.server_config.items()}
        return {**os.environ, **given, "PYTHONPATH": str(ROOT)}

    def start_holder(
        self, device: str = "shm:0", size: int | str = "2MiB", *, rank: int = 0
    ) -> tuple[subprocess.Popen[bytes], int]:
        """Start a holder and wait until its segment is lent: (process, segment number).

        Rank 1 is host memory, whatever plays the devices.
        """
        device = device if rank else device_of(device)
        command = [
            sys.executable,
            "-m",
            "vcache.cli",
            "segment",
            "--device",
            device,
            "--size",
            str(size_on(device, size)),
            "--rank",
            str(rank),
            "--json",
        ]
        environment = {**self.environment(), "VCACHE_SERVER_AUTOSTART": "false"}
        process = subprocess.Popen(
            [*command, "--runtime-dir", str(self.path)], cwd=ROOT, env=environment, stdout=subprocess.PIPE
        )
        self.holders.append(process)
        assert process.stdout is not None
        return process, int(json.loads(_line(process.stdout))["segment"])

    def start_worker(self) -> Worker:
        """A process that does nothing yet."""
        worker = Worker()
        self.workers.append(worker)
        return worker

    def engine(
        self, *, device: str = "shm:0", size: int | str = 0, pages: bool = False, **config: Any
    ) -> Worker:
        """A worker with an engine; size 0: it lends no segment. pages: of the layout's pages form."""
        worker = self.start_worker()
        given = {**self.client_config(), **config, **lent_on(device, size)}
        worker.call("open_engine", pages=pages, large=self.large, **given)
        return worker

    def client_config(self) -> dict[str, Any]:
        """Configuration of clients in tests: no autostart, quick reconciliation, much patience."""
        return {
            "runtime_dir": str(self.path),
            "server.autostart": False,
            "client.declare_interval_s": 0.1,
            "client.request_timeout_ms": 5_000,
        }

    # -- observation

    @property
    def observer(self) -> Client:
        """A client of the test itself; it holds nothing."""
        if self._observer is None:
            self._observer = Client(load(**self.client_config()).config, name="observer")
        return self._observer

    def serving_pid(self) -> int:
        """The process id of the server that answers now; 0 if none does."""
        try:
            return int(self.observer.stats().counters["pid"])
        except (Unavailable, ServerError):
            return 0

    def statistics(self) -> Statistics:
        """What the server says of itself."""
        assert self.observer.wait_connected(DEADLINE_S)
        return self.observer.stats()

    def counters(self) -> dict[str, float]:
        """The server's counters and gauges."""
        return self.statistics().counters

    def eventually(self, holds: Callable[[Pool], object], what: str, within_s: float = DEADLINE_S) -> None:
        """Wait until `holds(pool)`, which may ask the server. AssertionError with `what` after `within_s`."""
        eventually(lambda: holds(self), what, within_s)

    def assert_nothing_leaks(self) -> None:
        """Wait until nobody holds any right; then the server proves that all extents are accounted for.

        To be called when no worker does anything any more.
        """
        rights = ("reservations", "leases", "pins")
        nothing = f"no {', '.join(rights)} are left"
        self.eventually(lambda pool: not any(map(pool.counters().get, rights)), nothing, _RIGHTS_END_S)
        assert not sum(row.reserved_bytes for row in self.statistics().segments)
        self.check()

    def check(self) -> None:
        """The server proves that extents do not overlap and nothing leaks. Raises ServerError."""
        assert self.observer.wait_connected(DEADLINE_S)
        self.observer.check()


def lent_on(device: str, size: int | str = 0) -> dict[str, Any]:
    """Configuration of an engine on what plays this device, with a segment of at least that size there."""
    played = device_of(device)
    return {"device": played, "segment.size": size_on(played, size)}


def _line(stream: IO[bytes]) -> bytes:
    line = stream.readline()
    assert line, "the process ended before it said anything"
    return line
