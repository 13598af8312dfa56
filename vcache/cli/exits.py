"""The exit codes of `vcache`, for scripts and supervisors."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from vcache.errors import (
    ArgumentError,
    ConfigError,
    RemoteProtocolError,
    SegmentError,
    ServerError,
    Unavailable,
)


class Exit(IntEnum):
    """How a command ended."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NO_SERVER = 3
    REFUSED = 4
    SEGMENT = 5
    INTERRUPTED = 130


EXPLAINED: Final = {
    Exit.OK: "done",
    Exit.FAILED: "failed, or doctor found something wrong",
    Exit.USAGE: "wrong arguments or configuration",
    Exit.NO_SERVER: "no metadata server, or it does not answer",
    Exit.REFUSED: "the server refused",
    Exit.SEGMENT: "a segment cannot be had: no room, no GPU, no permission",
    Exit.INTERRUPTED: "interrupted",
}

_OF_ERROR: Final[dict[type[Exception], Exit]] = {
    ConfigError: Exit.USAGE,
    ArgumentError: Exit.USAGE,
    Unavailable: Exit.NO_SERVER,
    ServerError: Exit.REFUSED,
    RemoteProtocolError: Exit.REFUSED,
    SegmentError: Exit.SEGMENT,
}


def exit_of(error: Exception) -> Exit:
    """The exit code of a command that ended by this exception."""
    return next((code for kind, code in _OF_ERROR.items() if isinstance(error, kind)), Exit.FAILED)
