"""Engines that find no server start one: one for all of them, again when it was killed, gone when nobody
needs it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.processes.content import LAYOUT
from tests.processes.pool import Pool, lent_on
from tests.processes.worker import DEADLINE_S, Worker, eventually
from vcache.limits import AUTOSTART_INTERVAL_S
from vcache.runtime import lock_holder

CHUNK = LAYOUT.chunk_tokens
IDLE_EXIT_S = 1.0

AUTOSTART = {"server.autostart": True, "server.idle_exit_s": IDLE_EXIT_S, "client.connect_timeout_ms": 30_000}


@pytest.fixture
def pool() -> Iterator[Pool]:
    """A runtime directory; a server that was started there by itself is ended."""
    with Pool() as pool:
        yield pool
        for worker in pool.workers:
            worker.kill()
        pid = server_pid(pool)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: server_pid(pool) is None, "the server ended")


def server_pid(pool: Pool) -> int | None:
    """The process that holds the server's lock."""
    return lock_holder(pool.path / "server.lock")


def log_lines(pool: Pool, message: str) -> int:
    """How often a message is in the log of the servers that were started."""
    return (pool.path / "server.log").read_text().count(f" {message} ")


def open_engines(child: Any, count: int, config: dict[str, Any]) -> list[bool]:
    """Engines made at once by threads of one process; whether each is connected."""

    def one(_: int) -> Any:
        from tests.processes.content import AXES
        from vcache import VCacheEngine

        return VCacheEngine(layout=LAYOUT, model="test-model", kv_axes=AXES, **config)

    child.use(config["device"])
    with ThreadPoolExecutor(count) as threads:
        child.kept["engines"] = list(threads.map(one, range(count)))
    child.engine = child.kept["engines"][0]
    return [engine.wait_connected(DEADLINE_S) for engine in child.kept["engines"]]


def close_engines(child: Any) -> None:
    """Close what `open_engines` made."""
    for engine in child.kept["engines"]:
        engine.close()


def engine(pool: Pool, size: int | str = 0, **config: Any) -> Worker:
    """A worker with an engine that starts a server where there is none."""
    return pool.engine(size=size, **{**AUTOSTART, **config})


def test_ten_engines_at_once_start_one_server(pool: Pool) -> None:
    workers = [pool.start_worker() for _ in range(4)]
    config = {**pool.client_config(), **AUTOSTART, **lent_on("shm:0")}
    for worker, count in zip(workers, (3, 3, 2, 2), strict=True):
        worker.send("run", open_engines, count, config)
    for worker, count in zip(workers, (3, 3, 2, 2), strict=True):
        assert worker.result() == [True] * count
    assert log_lines(pool, "ready") == 1
    pid = server_pid(pool)
    assert pid is not None
    pool.eventually(lambda pool: pool.serving_pid() == pid, "it is the one that answers")
    assert len(pool.statistics().sessions) == 11, "ten engines and the observer"
    assert os.getsid(pid) not in {os.getsid(0), *(os.getsid(worker.pid) for worker in workers)}
    writer = engine(pool, "1MiB")
    writer.call("store", 1, 4 * CHUNK)
    for worker in workers:
        assert worker.call("retrieve", 1, 4 * CHUNK) == (4 * CHUNK, 0)
    for worker in workers:
        worker.call("run", close_engines)
    assert server_pid(pool) == pid


def test_server_outlives_the_engine_that_started_it(pool: Pool) -> None:
    first, second = engine(pool, "1MiB", **{"server.idle_exit_s": 60}), engine(pool, "1MiB")
    pid = server_pid(pool)
    second.call("store", 1, 4 * CHUNK)
    first.kill()
    pool.eventually(lambda pool: len(pool.statistics().segments) == 1, "the end of the first one was seen")
    assert second.call("retrieve", 1, 4 * CHUNK) == (4 * CHUNK, 0)
    assert server_pid(pool) == pid


def test_killed_server_is_started_again_and_the_pool_is_warm(pool: Pool) -> None:
    writer, reader = engine(pool, "1MiB"), engine(pool)
    writer.call("store", 1, 4 * CHUNK)
    first = server_pid(pool)
    assert first is not None
    allow_another_try(pool)
    os.kill(first, signal.SIGKILL)
    pool.eventually(lambda pool: pool.serving_pid() not in (0, first), "another one was started")
    for worker in (writer, reader):
        assert worker.call("run", connected)
    pool.eventually(lambda pool: all(row.held for row in pool.statistics().segments), "the holder is back")
    assert reader.call("retrieve", 1, 4 * CHUNK) == (4 * CHUNK, 0)
    assert log_lines(pool, "ready") == 2
    pool.assert_nothing_leaks()


def allow_another_try(pool: Pool) -> None:
    """As if AUTOSTART_INTERVAL_S had passed."""
    before = time.time() - AUTOSTART_INTERVAL_S - 1
    os.utime(pool.path / "autostart.lock", (before, before))


def connected(child: Any) -> bool:
    """Wait until the engine is served; whether it is."""
    return bool(child.engine.wait_connected(DEADLINE_S))


def test_server_ends_when_it_had_no_session_for_a_while(pool: Pool) -> None:
    worker = engine(pool, "1MiB")
    pid = server_pid(pool)
    assert pid is not None
    worker.call("store", 1, 4 * CHUNK)
    worker.call("close")
    closed_s = time.monotonic()
    eventually(lambda: server_pid(pool) is None, "it ended", 10 * IDLE_EXIT_S)
    assert time.monotonic() - closed_s > 0.9 * IDLE_EXIT_S
    left = {path.name for path in pool.path.iterdir()}
    assert left <= {"sessions", "server.lock", "server.log", "autostart.lock"}
    assert list((pool.path / "sessions").iterdir()) == []
    allow_another_try(pool)
    late = engine(pool, "1MiB")
    late.call("store", 1, 4 * CHUNK)
    assert late.call("retrieve", 1, 4 * CHUNK) == (4 * CHUNK, 0)


def test_engine_without_autostart_starts_none_and_takes_the_one_that_comes(pool: Pool) -> None:
    worker = pool.engine(size="1MiB")
    worker.call("store", 1, 4 * CHUNK)
    assert worker.call("retrieve", 1, 4 * CHUNK) == (0, 0)
    assert worker.call("stats")["failed_no_server"] > 0
    assert {path.name for path in pool.path.iterdir()} == {"sessions"}
    pool.start_server()
    assert worker.call("run", connected)
    worker.call("store", 1, 4 * CHUNK)
    assert worker.call("retrieve", 1, 4 * CHUNK) == (4 * CHUNK, 0)


def test_server_that_cannot_start_is_not_tried_in_a_loop(pool: Pool) -> None:
    """Here its log says why: something lies where its socket belongs."""
    pool.path.mkdir(mode=0o700)
    Path(pool.path / "session.sock").mkdir()
    worker = engine(pool, **{"client.connect_timeout_ms": 500})
    eventually(lambda: "session.sock" in (pool.path / "server.log").read_text(), "the log says why")
    assert not worker.call("run", soon_connected)
    assert worker.call("lookup", 1, 4 * CHUNK) == 0
    assert (pool.path / "server.log").read_text().count("Traceback") <= 1


def soon_connected(child: Any) -> bool:
    """Whether it is served within two seconds: enough for many tries."""
    return bool(child.engine.wait_connected(2.0))
