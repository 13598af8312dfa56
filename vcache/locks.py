"""Locks that say which process is alive: the server's, every session's, that of whoever starts a server."""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from pathlib import Path
from typing import Final

from vcache.errors import ConfigError, LocalStateError

_FLOCK: Final = struct.Struct("hh4xqqi4x")
"""struct flock on 64-bit Linux (fcntl(2)): l_type, l_whence, l_start, l_len, l_pid."""

_held: dict[tuple[int, int], OwnerLock] = {}
"""Lock files that this process has open, by device and inode. See OwnerLock for why."""
_held_guard = threading.Lock()


def _forget_in_child() -> None:
    """A child holds none of its parent's locks, and may open the files anew."""
    global _held_guard
    _held_guard = threading.Lock()  # another thread of the parent may have been inside
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class OwnerLock:
    """A lock on a file that one process holds: given up at the latest when it dies, never inherited.

    It is a POSIX record lock (fcntl(2)): unlike flock's it does not pass to a forked child, and the kernel
    tells who holds it. The price: **closing any descriptor of the file gives the lock up**, also one that
    other code of this process opened. So a lock file is opened here and nowhere else, and at most once per
    process: a second `OwnerLock` of it raises. To ask about a lock without holding it use `lock_holder`.
    """

    def __init__(self, path: Path, *, mode: int = 0o600) -> None:
        self.path = path
        self._mode = mode
        self._fd = -1
        self._pid = 0

    @property
    def held(self) -> bool:
        """Whether this process holds it; False in a forked child."""
        return self._fd >= 0 and self._pid == os.getpid()

    def try_acquire(self) -> bool:
        """Take the lock if nobody has it, making the file if there is none; True if it is ours now.

        Raises ConfigError if the file cannot be opened or locked at all, LocalStateError if this process
        holds it by another OwnerLock.
        """
        if self.held:
            return True
        with _held_guard:
            # Again if the file was removed or replaced between open and lock: that lock would guard nothing.
            while True:
                fd = self._open()
                if not _lock(fd, self.path):
                    return False
                if _leads_to(self.path, fd):
                    break
                os.close(fd)
            self._fd, self._pid = fd, os.getpid()
            _held[_identity(os.fstat(fd))] = self
            return True

    def _open(self) -> int:
        if _identity_of(self.path) in _held:
            raise LocalStateError(f"{self.path} is locked by this process already, by another OwnerLock")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(self.path, flags, self._mode)
        except OSError as error:
            raise ConfigError(f"lock file {self.path} cannot be opened: {error.strerror}") from error
        if _identity(os.fstat(fd)) in _held:
            # It was renamed to this path just now. Not closed: that would give up the lock that we hold.
            raise LocalStateError(f"{self.path} is a lock of this process already, under another name")
        return fd

    def holder_pid(self) -> int | None:
        """The process that holds the lock, as `lock_holder` says it."""
        return lock_holder(self.path)

    def still_ours(self) -> bool:
        """Whether this process holds the lock and the path still leads to it, not to another file."""
        return self.held and _leads_to(self.path, self._fd)

    def release(self, *, remove: bool = False) -> None:
        """Give the lock up; does nothing if it is not held. remove: the file too, while it is locked."""
        if not self.held:
            return
        with _held_guard:
            if remove and _leads_to(self.path, self._fd):
                os.unlink(self.path)
            _held.pop(_identity(os.fstat(self._fd)), None)
            os.close(self._fd)
            self._fd = -1


def lock_holder(path: Path) -> int | None:
    """The process id that holds the lock on a file; None if nobody does or there is no file.

    0 if the holder is in another PID namespace and has no number here: compare with None, not by truth.
    """
    with _held_guard:
        if _identity_of(path) in _held:
            return os.getpid()  # the kernel names no holder to the holder itself
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"lock file {path} cannot be opened: {error.strerror}") from error
        try:
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
        finally:
            os.close(fd)
        return None if kind == fcntl.F_UNLCK else int(pid)


def _lock(fd: int, path: Path) -> bool:
    """Lock the open file, or close it and return False."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: POSIX allows either for "held"
        os.close(fd)
        return False
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"lock file {path} cannot be locked: {error.strerror}") from error
    return True


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _identity_of(path: Path) -> tuple[int, int] | None:
    """None if no file is there, nor a directory that it could be in."""
    try:
        return _identity(os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _leads_to(path: Path, fd: int) -> bool:
    return _identity_of(path) == _identity(os.fstat(fd))
