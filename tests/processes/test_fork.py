"""After fork() the child's engine is unusable and says so; the parent's goes on, and the child's end is not
its end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.processes.content import LAYOUT
from tests.processes.devices import GPUS, device_of
from tests.processes.pool import ROOT, Pool
from tests.processes.worker import DEADLINE_S, eventually
from vcache.errors import ForkedProcess

CHUNK = LAYOUT.chunk_tokens
CHILD_DEADLINE_S = 30


@pytest.fixture
def pool() -> Iterator[Pool]:
    """A pool with a server."""
    with Pool(lease_ms=300) as pool:
        pool.start_server()
        yield pool


def in_fork(work: Callable[[], None]) -> int:
    """The exit code of a child that fork() made and that did `work`; 0 if it did not raise."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(CHILD_DEADLINE_S)  # one that hangs is killed
        try:
            work()
        except BaseException as error:
            print(f"in the forked child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def try_every_call(child: Any) -> int:
    """Fork, and have the child try everything that an engine does."""
    from tests.processes.content import PagedPrompt

    paged = PagedPrompt(1, 4 * CHUNK, device=child.device).fill()
    given = {"kvcaches": paged.kvcaches, "slot_mapping": paged.slots}
    engine = child.engine
    handle = engine.retrieve_async(paged.tokens, **given)

    def work() -> None:
        calls: list[Callable[[], object]] = [
            lambda: engine.store(paged.tokens, **given),
            lambda: engine.retrieve(paged.tokens, **given),
            lambda: engine.store_async(paged.tokens, **given),
            lambda: engine.retrieve_async(paged.tokens, **given),
            lambda: engine.lookup(paged.tokens),
            lambda: engine.contains(bytes(32)),
            engine.get_stats,
            lambda: engine.connected,
            lambda: engine.wait_connected(1.0),
            handle.result,
        ]
        for number, call in enumerate(calls):
            try:
                call()
            except ForkedProcess:
                continue
            raise AssertionError(f"call {number} did not say that it is in a forked child")
        engine.close()
        engine.close()

    code = in_fork(work)
    handle.result()
    return code


def test_childs_engine_says_so_and_the_parents_goes_on(pool: Pool) -> None:
    worker = pool.engine(size="1MiB")
    worker.call("store", 1, 4 * CHUNK)
    before = worker.call("stats")
    assert worker.call("run", try_every_call) == 0
    assert worker.call("retrieve", 1, 4 * CHUNK) == (4 * CHUNK, 0)
    worker.call("store", 2, 4 * CHUNK)
    assert worker.call("retrieve", 2, 4 * CHUNK) == (4 * CHUNK, 0)
    after = worker.call("stats")
    assert after["own_segment"] == before["own_segment"]
    assert not after.get("client_connections_lost")
    assert len(pool.statistics().sessions) == 2
    pool.assert_nothing_leaks()


def fork_amid_traffic(child: Any, forks: int) -> tuple[int, int]:
    """Fork again and again while threads store and retrieve: (exit codes that are not 0, wrong tokens)."""
    import threading

    ended = threading.Event()
    wrong = []

    def traffic(seed: int) -> None:
        while not ended.is_set():
            child.store(seed, 4 * CHUNK)
            wrong.append(child.retrieve(seed, 4 * CHUNK)[1])

    threads = [threading.Thread(target=traffic, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()

    def work() -> None:
        try:
            child.engine.lookup([1])
        except ForkedProcess:
            child.engine.close()
            return
        raise AssertionError("the child's engine was usable")

    codes = [in_fork(work) for _ in range(forks)]
    ended.set()
    for thread in threads:
        thread.join()
    return sum(code != 0 for code in codes), sum(wrong)


def test_fork_at_any_moment_harms_neither(pool: Pool) -> None:
    """Whatever lock another thread of the parent held at that moment, the child does not wait for it."""
    worker = pool.engine(size="1MiB")
    assert worker.call("run", fork_amid_traffic, 20) == (0, 0)
    assert not worker.call("stats").get("client_connections_lost")
    pool.assert_nothing_leaks()


def new_engine_in_fork(child: Any, config: dict[str, Any]) -> int:
    """Fork, and have the child make an engine of its own and read what the parent stored."""
    from tests.processes.content import AXES, prompt
    from vcache import VCacheEngine

    def work() -> None:
        with VCacheEngine(layout=LAYOUT, model="test-model", kv_axes=AXES, **config) as engine:
            assert engine.wait_connected(DEADLINE_S)
            assert engine.lookup(prompt(1, 4 * CHUNK)) == 4 * CHUNK
            child.engine = engine
            assert child.retrieve(1, 4 * CHUNK) == (4 * CHUNK, 0)
            child.store(2, 4 * CHUNK)

    parents = child.engine
    try:
        return in_fork(work)
    finally:
        child.engine = parents


@pytest.mark.skipif(bool(GPUS), reason="CUDA is not to be used in a child that fork() made")
def test_child_may_make_an_engine_of_its_own(pool: Pool) -> None:
    worker = pool.engine(size="1MiB")
    worker.call("store", 1, 4 * CHUNK)
    config = {**pool.client_config(), "segment.size": 0}
    assert worker.call("run", new_engine_in_fork, config) == 0
    assert worker.call("retrieve", 2, 4 * CHUNK) == (4 * CHUNK, 0)
    pool.eventually(lambda pool: len(pool.statistics().sessions) == 2, "the child's session ended with it")
    pool.assert_nothing_leaks()


PARENT = """
import os, sys
from tests.processes.content import AXES, LAYOUT, PagedPrompt
from tests.processes.devices import tensors_on
from vcache import VCacheEngine
device = sys.argv[3]
engine = VCacheEngine(
    layout=LAYOUT, model="test-model", kv_axes=AXES, runtime_dir=sys.argv[1],
    **{"device": device, "segment.size": "2MiB", "server.autostart": False},
)
assert engine.wait_connected(30)
paged = PagedPrompt(1, 4 * LAYOUT.chunk_tokens, device=tensors_on(device)).fill()
engine.store(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
child = os.fork()
if child == 0:
    if sys.argv[2] == "lives":
        sys.stdin.read()
    sys.exit(0)
print(child, flush=True)
if sys.argv[2] == "exits":
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def parent(pool: Pool) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts processes with an engine that fork, as scripts do: no harness around them."""
    started: list[subprocess.Popen[str]] = []

    def start(what: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "ignore", "-c", PARENT, str(pool.path), what, device_of("shm:0")]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=ROOT, env=pool.environment(), stdin=pipe, stdout=pipe, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(DEADLINE_S)
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def test_child_exits_as_python_does_and_the_parents_session_goes_on(
    pool: Pool, parent: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = parent("exits")
    assert process.stdout is not None
    assert process.stdout.readline()
    assert process.stdout.readline() == "0\n", "it did not hang, and nothing was raised"
    reader = pool.engine()
    assert reader.call("retrieve", 1, 4 * CHUNK) == (4 * CHUNK, 0)
    assert process.pid in {row.pid for row in pool.statistics().sessions}
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(DEADLINE_S) == 0
    pool.eventually(lambda pool: not pool.statistics().segments, "the parent's end is seen")


def test_parents_death_is_seen_though_its_child_lives(
    pool: Pool, parent: Callable[[str], subprocess.Popen[str]]
) -> None:
    """The child has inherited descriptors; none may keep the session, or the segment's memory, alive."""
    process = parent("lives")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    reader = pool.engine()
    assert reader.call("retrieve", 1, 4 * CHUNK) == (4 * CHUNK, 0)
    process.kill()
    process.wait(DEADLINE_S)
    pool.eventually(lambda pool: not pool.statistics().segments, "the session ended")
    assert reader.call("retrieve", 1, 4 * CHUNK) == (0, 0)
    os.kill(child, 0)
    assert process.stdin is not None
    process.stdin.close()
    eventually(lambda: not os.path.exists(f"/proc/{child}/fd/0"), "the child ended")
    pool.assert_nothing_leaks()
