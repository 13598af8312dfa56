"""The doctor's checks of kernel, limits, memory and runtime directory."""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import resource
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vcache import __version__
from vcache.cli import present
from vcache.cli.findings import Finding
from vcache.config import Config
from vcache.limits import MIB, SEGMENT_BYTES_DEFAULT_MIN, SESSIONS_MAX
from vcache.room import default_segment_bytes, memory_room
from vcache.runtime import OwnerLock, RuntimeDir, lock_holder, runtime_path

_DESCRIPTORS_WANTED: Final = 1024
"""Of one process: an engine needs one for each peer's segment, and has files and sockets of its own."""

_TABLE_ROOM_BYTES: Final = 16 * MIB
"""Of the runtime directory: the extent table grows with what is stored, 128 bytes an extent."""


def check_kernel() -> Iterator[Finding]:
    """What sessions and segments need of the kernel, which containers may forbid."""
    missing = [name for name, need in _NEEDS if not need()]
    found = f"Linux {platform.release()}, Python {platform.python_version()}, VCache {__version__}"
    if missing:
        yield Finding(
            check="kernel",
            verdict="failed",
            found=f"{found}; refused: {', '.join(missing)}",
            advice="Linux 5.4 or newer is needed; in a container, a seccomp profile that allows these calls",
        )
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_low = soft != resource.RLIM_INFINITY and soft < _DESCRIPTORS_WANTED
    yield Finding(
        check="kernel",
        verdict="warning" if is_low else "ok",
        found=f"{found}, {'any number of' if soft == resource.RLIM_INFINITY else soft} open files",
        advice=f"ulimit -n {4 * SESSIONS_MAX}: the server holds some for each session" if is_low else "",
    )


def _has_pidfd() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def _has_sealed_memfd() -> bool:
    try:
        fd = os.memfd_create("vcache-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return False
    try:
        os.posix_fallocate(fd, 0, mmap.PAGESIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


_NEEDS: Final = (("pidfd_open", _has_pidfd), ("memfd_create with seals", _has_sealed_memfd))


def check_runtime_dir(config: Config) -> Iterator[Finding]:
    """Whether the directory is private, in memory, and takes sockets and the table."""
    runtime = RuntimeDir.resolve(config.runtime_dir, group=config.server.group)
    _bind_in(runtime)
    free = shutil.disk_usage(runtime.path).free
    facts: dict[str, object] = {"path": str(runtime.path), "on_tmpfs": runtime.on_tmpfs, "free_bytes": free}
    whose = "this user only" if runtime.group is None else f"group {runtime.group}"
    found = f"{runtime.path} (for {whose}, {present.size(free)} free)"
    if free < _TABLE_ROOM_BYTES:
        yield Finding(
            check="runtime directory",
            verdict="failed",
            found=found,
            advice=f"the extent table needs room: {present.size(_TABLE_ROOM_BYTES)} at least; in a container "
            "start it with a larger --shm-size, or set runtime_dir",
            facts=facts,
        )
        return
    advice = "set runtime_dir to a place on tmpfs, such as /dev/shm: requests are slower on a disk"
    in_memory = runtime.on_tmpfs
    yield Finding(
        check="runtime directory",
        verdict="ok" if in_memory else "warning",
        found=found if in_memory else f"{found}, not on tmpfs",
        advice="" if in_memory else advice,
        facts=facts,
    )


def _bind_in(runtime: RuntimeDir) -> None:
    """Make a socket there as the server does, and remove it. Raises OSError."""
    path = runtime.path / f".{os.getpid():x}"  # not longer than the names whose length was checked
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.bind(str(path))
        path.unlink()


@contextmanager
def nothing_left_behind(config: Config) -> Iterator[None]:
    """Remove the runtime directory, or the server's lock in it, afterwards if this block made it."""
    path = runtime_path(config.runtime_dir)
    was_there, lock_was_there = os.path.lexists(path), os.path.lexists(path / "server.lock")
    try:
        yield
    finally:
        _remove_new(path, was_there=was_there, lock_was_there=lock_was_there)


def _remove_new(path: Path, *, was_there: bool, lock_was_there: bool) -> None:
    lock_path = path / "server.lock"
    if not os.path.isdir(path) or (was_there and (lock_was_there or not lock_path.exists())):
        return
    if lock_holder(lock_path) is not None:  # somebody else's server by now
        return
    lock = OwnerLock(lock_path)
    if lock.try_acquire():
        try:
            if not was_there:
                shutil.rmtree(path)
        finally:
            lock.release(remove=was_there)


def check_memory(config: Config) -> Iterator[Finding]:
    """Whether a segment of the configured size fits into what machine and containers leave."""
    room = memory_room(config.segment.numa)
    facts: dict[str, object] = {
        "available_bytes": room.available,
        "spendable_bytes": room.spendable,
        "limited_by": room.limited_by,
    }
    is_default = config.segment.size == "auto"
    wanted = default_segment_bytes(room) if config.segment.size == "auto" else config.segment.size
    what = f"a segment of {present.size(wanted)}{' (the default here)' if is_default else ''}"
    if config.device.startswith("cuda"):
        what, wanted = "segments on a GPU take none of it", 0
    fits = wanted <= room.spendable
    advice = (
        f"ask for at most {present.size(room.spendable)} (segment.size), or free memory in {room.limited_by}"
    )
    is_tight = room.spendable < SEGMENT_BYTES_DEFAULT_MIN
    yield Finding(
        check="memory",
        verdict="failed" if not fits else "warning" if is_tight else "ok",
        found=f"{room}; {what}{'' if fits else ' does not fit'}",
        advice="" if fits and not is_tight else advice,
        facts=facts,
    )
