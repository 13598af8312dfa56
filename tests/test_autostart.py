"""A server that clients start themselves: one, whoever comes first, and nobody's child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client_pool import DEADLINE_S, Pool, alive, answers, pool_in_memory, until
from vcache.client import Client
from vcache.limits import AUTOSTART_INTERVAL_S
from vcache.runtime import lock_holder

AUTOSTART = {"server.autostart": True, "server.idle_exit_s": 1.0}

CLIENT = """
import sys
from vcache.client import Client
from vcache.config import load
client = Client(load(**{"runtime_dir": sys.argv[1], "server.idle_exit_s": 1.0}).config, name="one of ten")
print("connected" if client.wait_connected(30) else "not connected", flush=True)
sys.stdin.read()
client.close()
"""


@pytest.fixture
def pool() -> Iterator[Pool]:
    """A directory without a server; one that was started there is ended."""
    with pool_in_memory() as pool:
        yield pool
        pid = server_pid(pool)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            until(lambda: not alive(pid), "the server ended")


def server_pid(pool: Pool) -> int | None:
    """The process that holds the server's lock."""
    return lock_holder(pool.path / "server.lock")


def ready_lines(pool: Pool) -> int:
    """How many servers became ready, by their log."""
    return (pool.path / "server.log").read_text().count(" ready ")


def test_ten_processes_start_one_server(pool: Pool) -> None:
    command = [sys.executable, "-c", CLIENT, str(pool.path)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(10)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "connected\n"
        assert ready_lines(pool) == 1
        pid = server_pid(pool)
        assert pid is not None
        assert os.getsid(pid) != os.getsid(0)
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        assert parent not in {process.pid for process in processes}, "it is nobody's child"
        assert os.sched_getaffinity(pid) == os.sched_getaffinity(0) or len(os.sched_getaffinity(pid)) > 1
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
    finally:
        for process in processes:
            process.communicate("", timeout=DEADLINE_S)
    until(lambda: server_pid(pool) is None, "it ends when nobody has a session")


def test_killed_server_is_started_again_but_not_in_a_loop(pool: Pool) -> None:
    client = pool.client(**AUTOSTART)
    first = server_pid(pool)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: not client.connected, "the end was noticed")
    assert not client.wait_connected(0.5), "two tries within AUTOSTART_INTERVAL_S"
    assert server_pid(pool) is None
    # As if the interval had passed.
    before = time.time() - AUTOSTART_INTERVAL_S - 1
    os.utime(pool.path / "autostart.lock", (before, before))
    assert client.wait_connected(DEADLINE_S)
    assert server_pid(pool) not in (None, first)
    assert client.counters["autostarts"] == 2


def test_server_that_is_just_dying_is_waited_for_without_a_try(pool: Pool) -> None:
    from vcache.client.autostart import start_server
    from vcache.runtime import RuntimeDir

    pool.start()
    client = pool.client()
    runtime = RuntimeDir.resolve(str(pool.path))
    assert answers(client)
    assert not start_server(pool.config(**AUTOSTART), runtime)
    assert not runtime.autostart_lock_path.exists(), "no try was spent"


def test_autostart_can_be_turned_off(pool: Pool) -> None:
    client = Client(pool.config(), name="test")
    try:
        assert not client.wait_connected(0.3)
        assert not (pool.path / "server.log").exists()
    finally:
        client.close()
