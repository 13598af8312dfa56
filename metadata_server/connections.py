"""Keeps the ROUTER socket from taking the last descriptor: libzmq aborts when it cannot accept."""

from __future__ import annotations

import logging
import os
import resource
from pathlib import Path
from typing import Final

import zmq

from vcache.limits import DESCRIPTORS_WANTED
from vcache.logs import Line

log = logging.getLogger(__name__)

_FULL_SHARE: Final = 0.75
"""Of the descriptors: from here on nobody new is let in; as many as can come within one tick must still fit.
"""
_ROOMY_SHARE: Final = 0.6


def allow_descriptors() -> None:
    """Raise the soft limit of open files to DESCRIPTORS_WANTED, as far as the hard limit lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_WANTED if hard == resource.RLIM_INFINITY else min(DESCRIPTORS_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Door:
    """The endpoint of the ROUTER socket: closed to new connections while descriptors are scarce.

    Closed means that the socket's file has another name, under which nobody looks for it. To unbind the
    endpoint would end the connections that are there, too.
    """

    def __init__(self, router: zmq.Socket[bytes], endpoint: str, path: Path, mode: int) -> None:
        self._path = path
        self._path_closed = path.with_suffix(".closed")
        self._path_closed.unlink(missing_ok=True)
        mask = os.umask(0o777 & ~mode)
        try:
            router.bind(endpoint)  # what an earlier server left at the path is replaced
        finally:
            os.umask(mask)
        self._inode = path.stat().st_ino
        self._is_open = True

    def tick(self) -> None:
        """Close or open by the number of descriptors that are in use."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        used = _descriptors_in_use(limit)
        if self._is_open and used > _FULL_SHARE * limit and self.still_ours():
            log.warning(Line("too many connections: nobody new is let in", descriptors=used, limit=limit))
            self._path.rename(self._path_closed)
            self._is_open = False
        elif not self._is_open and used < _ROOMY_SHARE * limit and self.still_ours():
            log.info(Line("new connections are let in again", descriptors=used, limit=limit))
            self._path_closed.rename(self._path)
            self._is_open = True

    def remove(self) -> None:
        """Take the socket's file away, for good."""
        (self._path if self._is_open else self._path_closed).unlink(missing_ok=True)

    def still_ours(self) -> bool:
        """Whether our socket is where we put it, and nobody's is where it belongs when it is closed."""
        if self._is_open:
            return inode_of(self._path) == self._inode
        return inode_of(self._path_closed) == self._inode and inode_of(self._path) is None


def inode_of(path: Path) -> int | None:
    """The file that a path leads to; None if there is none, nor a directory that it could be in."""
    try:
        return path.stat().st_ino
    except (FileNotFoundError, NotADirectoryError):
        return None


def _descriptors_in_use(limit: int) -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:  # to look takes one, too
        return limit
