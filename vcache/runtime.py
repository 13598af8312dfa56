"""The private runtime directory of one pool: where it is and what lies in it.

Everything in it is for one user (mode 0700), or for one group if the pool was configured so (0770). Whoever
can write there can serve wrong bytes, so a directory that others could have prepared for us is refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import grp
import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vcache.errors import ConfigError
from vcache.limits import SOCKET_PATH_BYTES_MAX
from vcache.locks import OwnerLock, lock_holder

__all__ = ["OwnerLock", "RuntimeDir", "lock_holder", "runtime_path"]

_log = logging.getLogger(__name__)

_LONGEST_SOCKET_NAME: Final = "session.sock"
_TMPFS_MAGIC: Final = 0x01021994
_RAMFS_MAGIC: Final = 0x858458F6


@dataclass(frozen=True)
class RuntimeDir:
    """A runtime directory that exists and is private; its properties name what lies in it.

    path: absolute. group: the group id that shares the pool, None if it is one user's.
    """

    path: Path
    group: int | None = None

    @classmethod
    def resolve(cls, configured: str | None = None, *, group: str | None = None) -> RuntimeDir:
        """Find the runtime directory, made if it is not there, and check that it is private.

        configured: its path; otherwise $XDG_RUNTIME_DIR/vcache where that is ours, else /dev/shm/vcache-UID.
        group: name or number of a group that may use the pool too; the directory is then 0770.
        Raises ConfigError if it is a link, no directory, not ours, open to others, or too long for a socket.
        """
        number = None if group is None else _group_number(group)
        path = runtime_path(configured)
        longest = os.fsencode(path / _LONGEST_SOCKET_NAME)
        if len(longest) > SOCKET_PATH_BYTES_MAX:
            wanted = SOCKET_PATH_BYTES_MAX - len(_LONGEST_SOCKET_NAME) - 1
            raise ConfigError(
                f"runtime_dir: got {path} ({len(os.fsencode(path))} bytes), wanted at most {wanted} bytes: "
                "Unix sockets lie in it, and their paths are limited"
            )
        for folder in (path, path / "sessions"):
            _make_private(folder, number)
        return cls(path, number)

    @property
    def rpc_path(self) -> Path:
        """The Unix socket of ZeroMQ requests."""
        return self.path / "rpc.sock"

    @property
    def rpc_endpoint(self) -> str:
        """`rpc_path` as ZeroMQ wants it."""
        return f"ipc://{self.rpc_path}"

    @property
    def session_path(self) -> Path:
        """The Unix socket of sessions and descriptors."""
        return self.path / _LONGEST_SOCKET_NAME

    @property
    def table_path(self) -> Path:
        """The extent table."""
        return self.path / "extents"

    @property
    def lock_path(self) -> Path:
        """The lock that the one server of this pool holds."""
        return self.path / "server.lock"

    @property
    def autostart_lock_path(self) -> Path:
        """The lock under which a client starts a server."""
        return self.path / "autostart.lock"

    @property
    def log_path(self) -> Path:
        """The log of a server that a client started."""
        return self.path / "server.log"

    @property
    def sessions_dir(self) -> Path:
        """Where every session has its lock."""
        return self.path / "sessions"

    def session_lock_path(self, session: int) -> Path:
        """The lock that a session holds for life. session: its 64-bit id."""
        return self.sessions_dir / f"{session:016x}.lock"

    @property
    def file_mode(self) -> int:
        """Mode of sockets, table and locks in it: 0600, or 0660 if a group shares the pool."""
        return 0o600 if self.group is None else 0o660

    @property
    def on_tmpfs(self) -> bool:
        """Whether it lies in memory. On a disk the extent table costs writes and outlives boots."""
        return _file_system_magic(self.path) in (_TMPFS_MAGIC, _RAMFS_MAGIC)


def runtime_path(configured: str | None = None) -> Path:
    """Where the runtime directory is or would be; nothing is made or checked."""
    return Path(os.path.abspath(os.path.expanduser(configured))) if configured else _default_path()


def _default_path() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.path.isabs(base):
        try:
            if os.stat(base).st_uid == os.geteuid():
                return Path(base) / "vcache"
        except OSError as error:  # left over from a login that ended, or somebody else's (sudo -E)
            _log.debug("XDG_RUNTIME_DIR=%s cannot be used: %s", base, error)
    return Path(f"/dev/shm/vcache-{os.geteuid()}")


def _group_number(group: str) -> int:
    try:
        return int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"server.group: got {group!r}, wanted the name or number of a group") from None


def _make_private(path: Path, group: int | None) -> None:
    """Make a directory, or check one that is there. ConfigError if others could have had a hand in it."""
    try:
        with contextlib.suppress(FileExistsError):  # then it is checked below, as if we had not tried
            os.mkdir(path, 0o700)
        found = os.lstat(path)
        if group is not None and _private_to_us(found):
            os.chown(path, -1, group)
            os.chmod(path, 0o2770)  # what is made in it belongs to the group, whoever makes it
            found = os.lstat(path)
    except OSError as error:
        raise ConfigError(f"runtime_dir: {path} cannot be made: {error.strerror}") from error
    if wrong := _objection(found, group):
        raise ConfigError(f"runtime_dir: {path} {wrong}")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        mode = f"{found.st_mode & 0o777:o}"
        raise ConfigError(f"runtime_dir: {path} cannot be written by user {os.geteuid()} (mode {mode})")


def _private_to_us(found: os.stat_result) -> bool:
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _objection(found: os.stat_result, group: int | None) -> str | None:
    """What is wrong with a directory that is there, in words; None if it is private."""
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link, wanted a directory of its own"
    if not stat.S_ISDIR(found.st_mode):
        return "is not a directory"
    mode = f"{found.st_mode & 0o777:o}"
    if group is None:
        if found.st_uid != os.geteuid():
            return f"belongs to user {found.st_uid}, wanted {os.geteuid()} (this process)"
        if found.st_mode & 0o077:
            return f"has mode {mode}, wanted 700 (nobody else may enter): chmod 700, or configure a group"
        return None
    if found.st_gid != group:
        return f"belongs to group {found.st_gid}, wanted {group} (server.group)"
    if found.st_mode & 0o007:
        return f"has mode {mode}, wanted 770 (nobody outside the group may enter)"
    return None


def _file_system_magic(path: Path) -> int:
    """`statfs.f_type` (statfs(2)); the struct begins with it as a long on every 64-bit Linux."""
    record = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(path), record) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return ctypes.c_long.from_buffer(record).value & 0xFFFFFFFF
