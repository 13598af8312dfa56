"""Processes that are just exiting: a restarted server leaves them what they may still write to.

A process whose first thread has exited, while another one lives on, looks to the kernel as one does in the
middle of its exit: it has begun to exit, it has given its lock up, and it is not gone. So nothing here
depends on how long an exit takes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from metadata_server.exiting import is_exiting, note
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S, eventually
from vcache.locks import lock_holder

ROOT = Path(__file__).parent.parent

HALF_EXIT = """
import ctypes, platform, sys, threading

def half_exit(release):
    # The first thread exits, by the system call itself; a second one gives the lock up and waits.
    def second():
        release()
        print("released", flush=True)
        sys.stdin.readline()
    threading.Thread(target=second).start()
    ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)
"""

LOCKED = (
    HALF_EXIT
    + """
from pathlib import Path
from vcache.locks import OwnerLock
lock = OwnerLock(Path(sys.argv[1]))
assert lock.try_acquire()
print("locked", flush=True)
if sys.stdin.readline() == "release\\n":
    lock.release()
    print("released", flush=True)
    sys.stdin.readline()
half_exit(lock.release)
"""
)

RESERVED = (
    HALF_EXIT
    + """
from pathlib import Path
from tests.support.raw_peer import RawPeer
peer = RawPeer(Path(sys.argv[1]))
assert peer.lock.try_acquire()
peer.greet()
assert len(peer.reserve(count=5)) == 5
print("reserved", flush=True)
sys.stdin.readline()
half_exit(peer.lock.release)
"""
)


class Child:
    """A process that does one thing more with each line that it is sent, and says so."""

    def __init__(self, script: str, path: Path) -> None:
        command = [sys.executable, "-c", script, str(path)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def says(self, word: str) -> None:
        """Wait for this word."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{word}\n"

    def told(self, line: str) -> None:
        """Let it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()


@contextmanager
def child_of(script: str, path: Path) -> Iterator[Child]:
    child = Child(script, path)
    try:
        yield child
    finally:
        child.process.kill()
        child.process.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "0123456789abcdef.lock"


def test_a_process_is_exiting_from_its_lock_to_its_end(path: Path) -> None:
    with child_of(LOCKED, path) as child:
        child.says("locked")
        note(path, child.process.pid)
        assert lock_holder(path) == child.process.pid, "to note it does not touch the lock"
        child.told("exit")
        child.says("released")
        eventually(lambda: is_exiting(path), "its first thread has exited")
        assert lock_holder(path) is None
        child.process.kill()
        eventually(lambda: not is_exiting(path), "it is gone, though nobody has waited for it yet")
        child.process.wait(DEADLINE_S)
        assert not is_exiting(path)


def test_a_process_that_gave_its_lock_up_and_lives_is_not_exiting(path: Path) -> None:
    with child_of(LOCKED, path) as child:
        child.says("locked")
        note(path, child.process.pid)
        child.told("release")
        child.says("released")
        assert lock_holder(path) is None
        assert not is_exiting(path)


@pytest.mark.parametrize(
    "content", [b"", b"x", b"1", b"1 2 3", b"0 0", b"-1 5", b"999999999999999999999 1", b"\xff\n"]
)
def test_what_names_no_exiting_process_is_ignored(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert not is_exiting(path)


def test_another_process_with_the_same_number_is_not_meant(path: Path) -> None:
    with child_of(LOCKED, path) as child:
        child.says("locked")
        note(path, child.process.pid)
        child.told("exit")
        child.says("released")
        eventually(lambda: is_exiting(path), "its first thread has exited")
        pid, started = path.read_text().split()
        path.write_text(f"{pid} {int(started) - 1}\n")
        note(tmp := path.with_name("other.lock"), child.process.pid)
        assert not tmp.exists(), "a lock that is not there is not made"
        assert not is_exiting(path)


def test_only_names_of_other_processes_are_noted(path: Path) -> None:
    path.touch()
    for pid in (0, os.getpid(), 1 << 22):
        note(path, pid)
        assert path.read_bytes() == b""


def test_a_restarted_server_waits_for_the_end_of_a_process(tmp_path: Path) -> None:
    """Its lock is free, as a dying process' is while a GPU still runs its kernels: what it reserved stays its
    own until it is gone.
    """
    with Pool() as pool:
        pool.start_server()
        pool.start_holder("shm:0", "2MiB")
        with child_of(RESERVED, pool.path) as child:
            child.says("reserved")
            pool.kill_server()
            child.told("exit")
            child.says("released")
            (lock,) = (each for each in (pool.path / "sessions").iterdir() if is_noted(each, child))
            eventually(lambda: is_exiting(lock), "its first thread has exited")
            pool.start_server()
            assert sum(row.reserved_bytes for row in pool.statistics().segments) == 5 * 4096
            child.process.kill()
            pool.assert_nothing_leaks()


def is_noted(path: Path, child: Child) -> bool:
    return path.read_bytes().startswith(b"%d " % child.process.pid)
