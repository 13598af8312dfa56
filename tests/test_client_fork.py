"""After fork() the child's client is unusable and says so; the parent's goes on, and its death is seen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.client_pool import DEADLINE_S, LAYOUT, Pool, alive, key, pool_in_memory, read, store, until
from vcache.errors import ForkedProcess
from vcache.limits import MIB

CHILD_TIMEOUT_S = 20


@pytest.fixture
def pool() -> Iterator[Pool]:
    """A directory with a server."""
    with pool_in_memory() as pool:
        pool.start()
        yield pool


def in_child(work: Callable[[], None]) -> int:
    """The exit code of a forked child that did `work` and then ended as Python does."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(CHILD_TIMEOUT_S)  # a child that hangs is killed, and the test fails
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_child_is_refused_and_the_parent_goes_on(pool: Pool) -> None:
    client = pool.client(lends=4 * MIB)
    store(client, [1])
    grant = client.acquire([key(1)], layout=LAYOUT, pin=True)
    lineage = grant.lineage

    def every_call() -> None:
        calls: list[Callable[[], object]] = [
            client.ping,
            client.stats,
            lambda: client.lookup([], LAYOUT),
            lambda: client.lookup([key(1)], LAYOUT),
            lambda: client.acquire([key(1)], layout=LAYOUT),
            lambda: client.reserve([key(2)], layout=LAYOUT, size=10),
            lambda: client.release(grant),
            lambda: client.abort(grant.extents),
            lambda: client.commit(grant.extents, [key(1)], [1], namespace=b"N" * 8),
            lambda: client.intact(grant),
            lambda: client.segment(1, lineage),
            lambda: client.wait_connected(1),
        ]
        for call in calls:
            with pytest.raises(ForkedProcess, match="before fork"):
                call()
        assert not client.connected
        client.close()

    assert in_child(every_call) == 0
    assert client.connected
    assert read(client, [1]) == 1
    assert client.intact(grant)
    client.release(grant)
    client.check()


def test_child_may_make_a_client_of_its_own(pool: Pool) -> None:
    parent = pool.client(lends=4 * MIB)
    store(parent, [1])

    def anew() -> None:
        client = pool.client("child", lends=4 * MIB)
        assert read(client, [1]) == 1
        assert store(client, [2]) == 1
        client.close()

    assert in_child(anew) == 0
    assert parent.lookup([key(1)], LAYOUT) == 1
    until(lambda: len(parent.stats().sessions) == 1, "the child's session ended")


PARENT = """
import os, sys, time
from pathlib import Path
from tests.client_pool import Pool, store
from vcache.limits import MIB
pool = Pool(Path(sys.argv[1]))
client = pool.client(lends=4 * MIB)
assert store(client, [1]) == 1
child = os.fork()
if child == 0:
    if sys.argv[2] == "exits":
        sys.exit(0)
    time.sleep(600)
print(child, flush=True)
if sys.argv[2] == "exits":
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    client.close()
else:
    time.sleep(600)
"""


def run_parent(pool: Pool, what: str) -> subprocess.Popen[str]:
    """A process with a client that forks."""
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, str(pool.path), what], stdout=subprocess.PIPE, text=True
    )


def test_child_ends_as_python_does_without_hanging(pool: Pool) -> None:
    with run_parent(pool, "exits") as parent:
        output, _ = parent.communicate(timeout=DEADLINE_S)
    assert output.split()[1] == "0"
    assert parent.returncode == 0


def test_death_of_the_parent_is_seen_though_a_child_lives(pool: Pool) -> None:
    observer = pool.client("observer")
    with run_parent(pool, "lives") as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            assert observer.lookup([key(1)], LAYOUT) == 1
            parent.kill()
            parent.wait(DEADLINE_S)
            until(lambda: len(observer.stats().sessions) == 1, "the session ended")
            assert alive(child)
            assert observer.lookup([key(1)], LAYOUT) == 0
            assert observer.stats().segments == []
        finally:
            os.kill(child, signal.SIGKILL)
