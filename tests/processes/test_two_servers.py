"""Two servers want one runtime directory, or somebody takes it away: at most one grants, and who has it is
said.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes.content import LAYOUT
from tests.processes.pool import ROOT, Pool
from tests.processes.worker import DEADLINE_S, eventually
from vcache.runtime import lock_holder

CHUNK = LAYOUT.chunk_tokens
SIZE = "2MiB"

IMPATIENT: dict[str, Any] = {"client.request_timeout_ms": 100}

EXIT_CONFLICT = 3
EXIT_USURPED = 4


@pytest.fixture
def pool() -> Iterator[Pool]:
    """A runtime directory; servers are started by the tests."""
    with Pool() as pool:
        yield pool


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[str]]]:
    """Servers that are ended with the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(pool: Pool, servers: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """Start a server; it is not waited for."""
    command = [sys.executable, "-m", "metadata_server.server", "--runtime-dir", str(pool.path)]
    process = subprocess.Popen(command, cwd=ROOT, env=pool.environment(), stderr=subprocess.PIPE, text=True)
    servers.append(process)
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error of a server that ends."""
    _, errors = process.communicate(timeout=DEADLINE_S)
    return process.returncode, errors


@pytest.mark.parametrize("count", [2, 6])
def test_of_servers_started_at_once_exactly_one_runs(
    pool: Pool, servers: list[subprocess.Popen[str]], count: int
) -> None:
    for _ in range(count):
        start(pool, servers)
    pool.eventually(lambda pool: pool.serving_pid(), "one answers")
    winner = pool.serving_pid()
    losers = [process for process in servers if process.pid != winner]
    assert len(losers) == count - 1
    for process in losers:
        code, errors = ended(process)
        assert code == EXIT_CONFLICT
        assert f"process {winner} holds server.lock" in errors
        assert str(pool.path) in errors
        assert "Traceback" not in errors
    assert pool.serving_pid() == winner
    assert next(process for process in servers if process.pid == winner).poll() is None


def test_second_server_disturbs_nothing(pool: Pool, servers: list[subprocess.Popen[str]]) -> None:
    first = pool.start_server()
    worker = pool.engine(size=SIZE)
    worker.call("store", 1, 3 * CHUNK)
    code, errors = ended(start(pool, servers))
    assert code == EXIT_CONFLICT
    assert f"process {first.pid} " in errors
    assert worker.call("retrieve", 1, 3 * CHUNK) == (3 * CHUNK, 0)
    assert not worker.call("stats").get("client_connections_lost")
    pool.assert_nothing_leaks()


def test_stopped_server_still_has_the_directory(pool: Pool, servers: list[subprocess.Popen[str]]) -> None:
    first = pool.start_server()
    with pool.server_stopped():
        code, errors = ended(start(pool, servers))
    assert code == EXIT_CONFLICT
    assert f"process {first.pid} " in errors


def test_successor_takes_over_at_once_when_the_first_is_killed(
    pool: Pool, servers: list[subprocess.Popen[str]]
) -> None:
    pool.start_server()
    worker = pool.engine(size=SIZE)
    worker.call("store", 1, 3 * CHUNK)
    pool.kill_server()
    successors = [start(pool, servers) for _ in range(2)]
    pool.eventually(lambda pool: pool.serving_pid(), "one answers")
    eventually(lambda: worker.call("retrieve", 1, 3 * CHUNK) == (3 * CHUNK, 0), "the pool is warm")
    winner = pool.serving_pid()
    (loser,) = [process for process in successors if process.pid != winner]
    assert ended(loser)[0] == EXIT_CONFLICT
    assert pool.serving_pid() == winner


# -- taken away


def _remove_directory(path: Path) -> None:
    shutil.rmtree(path)


def _replace(name: str) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        (path / name).unlink()
        (path / name).touch(mode=0o600)

    replace.__name__ = f"replace_{name}"
    return replace


def _remove(name: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        (path / name).unlink()

    remove.__name__ = f"remove_{name}"
    return remove


TAKEN = [
    _remove_directory,
    *map(_replace, ("server.lock", "rpc.sock")),
    *map(_remove, ("server.lock", "session.sock")),
]


@pytest.mark.parametrize("take", TAKEN, ids=lambda take: take.__name__)
def test_server_whose_directory_was_taken_away_ends_and_the_next_one_serves(
    pool: Pool, take: Callable[[Path], None]
) -> None:
    first = pool.start_server()
    writer = pool.engine(size=SIZE)
    writer.call("store", 1, 3 * CHUNK)
    take(pool.path)
    assert first.wait(DEADLINE_S) == EXIT_USURPED
    eventually(lambda: writer.call("retrieve", 1, CHUNK) == (0, 0), "without a server everything is a miss")
    assert writer.call("lookup", 1, CHUNK) == 0
    pool.start_server()

    def stored() -> bool:
        writer.call("store", 2, 3 * CHUNK)
        return bool(writer.call("retrieve", 2, 3 * CHUNK) == (3 * CHUNK, 0))

    eventually(stored, "the engine goes on with the next server")
    reader = pool.engine()
    assert reader.call("retrieve", 2, 3 * CHUNK) == (3 * CHUNK, 0)
    hit, wrong = reader.call("retrieve", 1, 3 * CHUNK)
    assert wrong == 0
    assert hit == (0 if take is _remove_directory else 3 * CHUNK), "the table is the pool's memory"
    pool.assert_nothing_leaks()


def test_a_file_where_the_directory_was_ends_the_server_and_costs_clients_a_warning(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    first = pool.start_server()
    writer = pool.engine(size=SIZE)
    writer.call("store", 1, 3 * CHUNK)
    assert pool.observer.connected
    away = pool.path.with_suffix(".away")
    pool.path.rename(away)
    pool.path.touch()
    with caplog.at_level("WARNING", "vcache"):
        assert first.wait(DEADLINE_S) == EXIT_USURPED
        eventually(lambda: "not a directory" in caplog.text.lower(), "the observer has said why")
    assert writer.call("retrieve", 1, CHUNK) == (0, 0)
    pool.path.unlink()
    away.rename(pool.path)
    pool.start_server()
    eventually(lambda: writer.call("retrieve", 1, 3 * CHUNK) == (3 * CHUNK, 0), "all is as before")
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    pool.assert_nothing_leaks()


def test_successor_whose_lock_replaced_the_firsts_is_left_in_peace(
    pool: Pool, servers: list[subprocess.Popen[str]]
) -> None:
    """The first one ends without taking anything of the second's with it, its sockets least of all.

    Requests of before wait in its sockets when it wakes: to carry them out would spoil its successor's table.
    """
    first = pool.start_server()
    worker = pool.engine(size=SIZE, **IMPATIENT)
    worker.call("store", 1, 3 * CHUNK)
    with pool.server_stopped():
        for seed in range(2, 5):
            worker.call("store", seed, 3 * CHUNK)
        (pool.path / "server.lock").unlink()
        second = start(pool, servers)
        eventually(
            lambda: lock_holder(pool.path / "server.lock") == second.pid, "the second one has the lock"
        )
        newcomer = pool.engine()
        eventually(
            lambda: newcomer.call("lookup", 1, 3 * CHUNK) == 3 * CHUNK, "the second one found the pool warm"
        )
        sockets = inodes(pool)
    assert first.wait(DEADLINE_S) == EXIT_USURPED
    eventually(
        lambda: worker.call("retrieve", 1, 3 * CHUNK) == (3 * CHUNK, 0), "the engine came to the second one"
    )
    assert pool.counters()["chunks"] == 3, "nothing of what the first one was asked was carried out"
    assert inodes(pool) == sockets
    assert second.poll() is None
    worker.call("store", 5, 3 * CHUNK)
    assert newcomer.call("retrieve", 5, 3 * CHUNK) == (3 * CHUNK, 0)
    pool.assert_nothing_leaks()


def inodes(pool: Pool) -> dict[str, int]:
    """Which files the names in the directory lead to."""
    return {
        name: (pool.path / name).stat().st_ino
        for name in ("rpc.sock", "session.sock", "server.lock", "extents")
    }
