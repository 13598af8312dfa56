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
    """The endpoint of the ROUTER socket: closed to new connections while descriptors are scarce."""

    def __init__(self, router: zmq.Socket[bytes], endpoint: str, path: Path, mode: int) -> None:
        self._router = router
        self._endpoint = endpoint
        self._path = path
        self._mode = mode
        self._inode = 0
        self.open()

    def open(self) -> None:
        """Let new connections in; what an earlier server left at the path is replaced."""
        mask = os.umask(0o777 & ~self._mode)
        try:
            self._router.bind(self._endpoint)
        finally:
            os.umask(mask)
        self._inode = self._path.stat().st_ino

    def tick(self) -> None:
        """Close or open by the number of descriptors that are in use."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        used = _descriptors_in_use(limit)
        if self._inode and used > _FULL_SHARE * limit:
            log.warning(Line("too many connections: nobody new is let in", descriptors=used, limit=limit))
            self._inode = 0
            self._router.unbind(self._endpoint)
        elif not self._inode and used < _ROOMY_SHARE * limit:
            log.info(Line("new connections are let in again", descriptors=used, limit=limit))
            self.open()

    def still_ours(self) -> bool:
        """Whether the path leads to our socket (or is closed by us)."""
        if not self._inode:
            return True
        try:
            return self._path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False


def _descriptors_in_use(limit: int) -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:  # to look takes one, too
        return limit
