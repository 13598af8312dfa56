"""Owner locks between real processes: held for life, not inherited, and not lost by accident."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vcache.errors import ConfigError, LocalStateError
from vcache.locks import OwnerLock, lock_holder

HOLD = """
import sys
from pathlib import Path
from vcache.locks import OwnerLock
lock = OwnerLock(Path(sys.argv[1]))
print(lock.try_acquire(), flush=True)
sys.stdin.read()
"""


def start_holder(path: Path) -> subprocess.Popen[str]:
    """A process that tries for the lock, says whether it got it, and keeps it until its stdin ends."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_one_process_holds_it_and_death_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lock_holder(path) is None
    with start_holder(path) as first:
        assert said(first) == "True"
        lock = OwnerLock(path)
        assert not lock.try_acquire()
        assert not lock.held
        assert lock.holder_pid() == lock_holder(path) == first.pid
        first.send_signal(signal.SIGKILL)
        first.wait(10)
        assert lock_holder(path) is None
        assert lock.try_acquire()
        assert lock.try_acquire(), "taking what one has is no error"
        with start_holder(path) as second:
            assert said(second) == "False"
            second.kill()
    assert lock_holder(path) == os.getpid()
    lock.release()
    assert lock_holder(path) is None


def test_asking_about_ones_own_lock_does_not_lose_it(tmp_path: Path) -> None:
    lock = OwnerLock(tmp_path / "lock")
    assert lock.try_acquire()
    assert lock_holder(lock.path) == os.getpid()
    with start_holder(lock.path) as other:
        assert said(other) == "False"
        other.kill()
    lock.release()


def test_a_second_lock_of_the_same_file_in_one_process_raises(tmp_path: Path) -> None:
    lock = OwnerLock(tmp_path / "lock")
    assert lock.try_acquire()
    os.link(lock.path, tmp_path / "alias")
    for path in (lock.path, tmp_path / "alias"):
        with pytest.raises(LocalStateError, match="already"):
            OwnerLock(path).try_acquire()
    with start_holder(lock.path) as other:
        assert said(other) == "False"
        other.kill()
    lock.release()
    again = OwnerLock(lock.path)
    assert again.try_acquire()
    again.release()


FORK = """
import os, sys
from pathlib import Path
from vcache.locks import OwnerLock, lock_holder
lock = OwnerLock(Path(sys.argv[1]))
assert lock.try_acquire()
child = os.fork()
if child == 0:
    assert not lock.held and not lock.still_ours()
    assert lock_holder(lock.path) == os.getppid()
    lock.release()
    assert not OwnerLock(lock.path).try_acquire()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert lock.still_ours()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_forked_child_does_not_inherit_it_and_cannot_give_it_up(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", FORK, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert said(parent) == "held"
        assert not OwnerLock(path).try_acquire()
        assert lock_holder(path) == parent.pid
        parent.kill()


def test_a_lock_whose_file_was_taken_away_is_not_ours_any_more(tmp_path: Path) -> None:
    lock = OwnerLock(tmp_path / "lock")
    assert lock.try_acquire()
    assert lock.still_ours()
    lock.path.unlink()
    assert not lock.still_ours()
    lock.path.touch()
    assert not lock.still_ours()
    assert lock.held
    lock.release(remove=True)
    assert lock.path.exists(), "the file that took its place is not ours to remove"


def test_release_can_remove_the_file(tmp_path: Path) -> None:
    lock = OwnerLock(tmp_path / "lock", mode=0o600)
    assert lock.try_acquire()
    assert lock.path.stat().st_mode & 0o777 == 0o600
    lock.release(remove=True)
    assert not lock.path.exists()
    lock.release(remove=True)


def test_a_path_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(ConfigError, match="cannot be opened"):
        OwnerLock(tmp_path / "link").try_acquire()
    with pytest.raises(ConfigError, match="cannot be opened: No such file"):
        OwnerLock(tmp_path / "no" / "lock").try_acquire()


def test_no_descriptor_leaks(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    lock = OwnerLock(tmp_path / "lock")
    for _ in range(3):
        assert lock.try_acquire()
        lock_holder(lock.path)
        lock.release()
        lock_holder(lock.path)
    assert len(os.listdir("/proc/self/fd")) == before
