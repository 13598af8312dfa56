"""What the client's tests share: a real server in its own directory, clients, chunks of known bytes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vcache.client import Client, Grant
from vcache.config import Config, load
from vcache.errors import ServerError, Unavailable
from vcache.protocol import Outcome
from vcache.segment import Segment, allocate

DEADLINE_S = 20.0
LAYOUT = b"L" * 16
NAMESPACE = b"N" * 8
SIZE = 64 << 10


def key(number: int) -> bytes:
    """A key that says which bytes belong under it."""
    return number.to_bytes(8, "little") * 4


def content(number: int) -> int:
    """The byte that the chunk under `key(number)` consists of."""
    return number * 37 % 251 + 1


def until(reached: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait for something that another process or thread brings about."""
    pause = threading.Event()
    end_s = time.monotonic() + deadline_s
    while not reached():
        assert time.monotonic() < end_s, f"waited {deadline_s} s: {what}"
        pause.wait(0.005)


class Pool:
    """A runtime directory, and a server in it that can be killed, stopped and started again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.server: subprocess.Popen[bytes] | None = None
        self._clients: list[Client] = []

    def config(self, **given: Any) -> Config:
        """Configuration for this directory; no autostart unless asked for."""
        return load(**{"runtime_dir": str(self.path), "server.autostart": False, **given}).config

    def start(self) -> None:
        """Start the server; it is not waited for."""
        options = ["--runtime-dir", str(self.path), "--log-level", "warning"]
        self.server = subprocess.Popen([sys.executable, "-m", "metadata_server.server", *options])

    def kill(self) -> None:
        """SIGKILL the server."""
        assert self.server is not None
        self.server.kill()
        self.server.wait(DEADLINE_S)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The server under SIGSTOP."""
        assert self.server is not None
        self.server.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.server.pid, os.WSTOPPED | os.WNOWAIT)  # it sleeps before the block begins
        try:
            yield
        finally:
            self.server.send_signal(signal.SIGCONT)

    def client(self, name: str = "test", *, lends: int = 0, wait: bool = True, **given: Any) -> Client:
        """A client, connected if there is a server; `lends`: bytes of its own segment."""
        new: Callable[[], Segment] | None = (lambda: allocate("shm:0", lends)) if lends else None
        client = Client(self.config(**given), name=name, new_segment=new)
        self._clients.append(client)
        if wait:
            assert client.wait_connected(DEADLINE_S)
        return client

    def close(self) -> None:
        """End everything."""
        for client in self._clients:
            client.close()
        if self.server is not None and self.server.poll() is None:
            self.server.send_signal(signal.SIGCONT)
            self.server.kill()
            self.server.wait(DEADLINE_S)


@contextlib.contextmanager
def pool_in_memory() -> Iterator[Pool]:
    """A pool whose directory is on tmpfs, as it should be."""
    with tempfile.TemporaryDirectory(prefix="vc-", dir="/dev/shm") as folder:
        pool = Pool(Path(folder) / "run")
        try:
            yield pool
        finally:
            pool.close()


def store(client: Client, numbers: list[int]) -> int:
    """Store the chunks of these numbers that are not there; how many this call committed."""
    keys = [key(number) for number in numbers]
    reserved = client.reserve(keys, layout=LAYOUT, size=SIZE)
    missing = [n for n, there in zip(numbers, reserved.present, strict=True) if not there][
        : len(reserved.extents)
    ]
    for extent, number in zip(reserved.extents, missing, strict=True):
        memory = client.segment(int(extent["segment"]), reserved.lineage)
        borrow = memory.borrow() if memory is not None else None
        if memory is None or borrow is None:
            client.abort(reserved.extents)
            return 0
        with borrow:
            view = memory.view(int(extent["offset"]), SIZE)
            if view.is_cuda:
                view.fill_(content(number)).cpu()  # until it has really happened
            else:  # by numpy: torch's threads do not survive a fork, and some of these tests store in a child
                view.numpy()[:] = content(number)
    outcomes = client.commit(
        reserved.extents, [key(n) for n in missing], [SIZE] * len(missing), namespace=NAMESPACE
    )
    return outcomes.count(Outcome.COMMITTED)


def read(client: Client, numbers: list[int], *, pin: bool = False) -> int:
    """How many leading chunks are there. AssertionError if one counts and its bytes are wrong."""
    grant = client.acquire([key(n) for n in numbers], layout=LAYOUT, pin=pin)
    try:
        return count_right(client, grant, numbers)
    finally:
        client.release(grant)


def count_right(client: Client, grant: Grant, numbers: list[int]) -> int:
    """As `read`, under a grant that is there already."""
    seen = []
    for extent in grant.extents:
        memory = client.segment(int(extent["segment"]), grant.lineage)
        borrow = memory.borrow() if memory is not None else None
        if memory is None or borrow is None:
            return 0
        with borrow:
            view = memory.view(int(extent["offset"]), int(extent["length"]))
            seen.append(np.unique(view.cpu().numpy().copy()).tolist())
    if not client.intact(grant):
        return 0
    assert seen == [[content(number)] for number in numbers[: len(seen)]], (
        "bytes of another chunk were served"
    )
    return len(seen)


def held(client: Client) -> tuple[float, float]:
    """(reserved bytes of all segments, pins of all sessions) as the server counts them."""
    statistics = client.stats()
    return sum(s.reserved_bytes for s in statistics.segments), sum(s.pins for s in statistics.sessions)


def answers(client: Client) -> bool:
    """Whether the server answers this client now."""
    try:
        client.ping()
    except (Unavailable, ServerError):
        return False
    return True


def alive(pid: int) -> bool:
    """Whether a process is there (a zombie is not)."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))
