"""What the server's own parts raise: each becomes an `Error` reply, or the end of the server."""

from __future__ import annotations


class Refusal(Exception):
    """The request is refused and changed nothing; `code` is a `vcache.protocol.ErrorCode`."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class ServerConflict(Exception):
    """Another server has this runtime directory, or took it; the text says which process."""
