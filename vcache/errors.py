"""Every exception that VCache raises, and whose fault each one is.

    VCacheError
    ├── ConfigError            the configuration: a field, its value, what is wanted
    ├── ArgumentError          the caller: an argument, its value, what is wanted (also a ValueError)
    ├── LocalStateError        the caller: the right call at the wrong time
    │   ├── EngineClosed           used after close()
    │   └── ForkedProcess          used in a child that fork() made
    ├── SegmentError           the machine: memory that cannot be allocated, exported or mapped
    ├── Unavailable            nobody's: no server there, a deadline passed, a connection was lost
    ├── ServerError            the server refused: a code and its words
    └── RemoteProtocolError    the peer: it sent something that the protocol does not allow

A miss is a value, never an exception; `Unavailable`, `ServerError` and `RemoteProtocolError` do not leave the
engine.
"""

from __future__ import annotations


class VCacheError(Exception):
    """Base of every exception raised by VCache."""


class ConfigError(VCacheError):
    """The configuration is wrong; the message names the field, its value and what is wanted."""


class ArgumentError(VCacheError, ValueError):
    """The caller passed a wrong argument; the message names the field, its value and what is wanted."""

    def __init__(self, field: str, value: object, wanted: str) -> None:
        self.field = field
        self.wanted = wanted
        super().__init__(f"{field}: got {value}, wanted {wanted}")


class LocalStateError(VCacheError):
    """The call is right, but not in the state that this process is in."""


class EngineClosed(LocalStateError):
    """The engine or client was used after `close()`."""


class ForkedProcess(LocalStateError):
    """The engine or client was made before `fork()` and used in the child."""


class SegmentError(VCacheError):
    """A segment could not be allocated, exported or mapped; the message says what there is and what to do."""


class Unavailable(VCacheError):
    """No answer: no server is there, the deadline passed, or the connection was lost."""


class ServerError(VCacheError):
    """The server refused a request.

    `code` is a `vcache.protocol.ErrorCode`; the message is the server's own words.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(f"{code}: {message}")


class RemoteProtocolError(VCacheError):
    """A peer sent something that the protocol does not allow."""
