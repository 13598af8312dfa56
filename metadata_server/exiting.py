"""Processes on their way out: their locks are free already, what they launched on a GPU may still write.

The kernel frees a dying process' locks while it closes its files, and only afterwards lets the GPU's driver
end its work. A server that was there then watches the pidfd; one that was restarted meanwhile finds a free
lock. So the server notes in each session's lock file whose it is, and looks here whether that one is gone.
"""

from __future__ import annotations

import logging
import os
import select
from pathlib import Path
from typing import Final

from vcache.logs import Line

log = logging.getLogger(__name__)

_PF_EXITING: Final = 0x4
"""Of the flags in /proc/PID/stat (proc_pid_stat(5)): include/linux/sched.h."""

_FLAGS_AT: Final = 9 - 3
_STARTED_AT: Final = 22 - 3
"""Fields are counted from 1; the third is the first after the name in parentheses."""


def note(path: Path, pid: int) -> None:
    """Write into a session's lock file which process it belongs to; 0, of another PID namespace, is no name.

    Never into a file that this process has locked: closing any descriptor of it would give the lock up.
    """
    found = _flags_and_start(pid) if pid not in (0, os.getpid()) else None
    if found is None:
        return
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        log.debug(Line("a session's process is not noted", path=path, error=str(error)))
        return
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d %d\n" % (pid, found[1]), 0)
    except OSError as error:
        log.debug(Line("a session's process is not noted", path=path, error=str(error)))
    finally:
        os.close(fd)


def is_exiting(path: Path) -> bool:
    """Whether the process that is noted in a lock file has begun to exit and is not gone.

    False for one that lives: it gave its lock up because its session had ended. Ask only when the lock is
    free.
    """
    try:
        pid, started = map(int, path.read_bytes().split())
        pidfd = os.pidfd_open(pid)
    except (OSError, ValueError, OverflowError):  # nothing noted, or no such process any more
        return False
    try:
        found = _flags_and_start(pid)
        if found is None or found[1] != started or not found[0] & _PF_EXITING:
            return False
        gone = select.poll()
        gone.register(pidfd, select.POLLIN)
        return not gone.poll(0)
    finally:
        os.close(pidfd)


def _flags_and_start(pid: int) -> tuple[int, int] | None:
    """The kernel's flags of a process, and when it started (clock ticks since the boot); None if unknown."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        fields = text[text.rindex(")") + 2 :].split()
        return int(fields[_FLAGS_AT]), int(fields[_STARTED_AT])
    except (OSError, ValueError, IndexError):
        return None
