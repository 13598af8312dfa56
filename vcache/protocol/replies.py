"""What the metadata server answers, and the frames around both."""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

from vcache.protocol.base import Message


class Pong(Message, frozen=True):
    """The server is there."""

    pid: int


class Done(Message, frozen=True):
    """It is done; `count` is of what the request counts."""

    count: int = 0


class Reserved(Message, frozen=True):
    """`extents` (packed EXTENT, length = room), in the order of the keys whose bit in `present` is 0.

    wanted: how many were missing. Less was granted when len(extents) < wanted: that much fitted.
    coming: to a patient request that was granted nothing: extents that will be free when they were copied.
    """

    extents: bytes
    present: bytes
    wanted: int
    coming: int = 0


class Committed(Message, frozen=True):
    """One `Outcome` a handle, as bytes."""

    outcomes: bytes


class Outcome:
    """What became of a reserved extent at commit."""

    COMMITTED: Final = 0
    """Others see it; the caller never touches it again."""
    LOST: Final = 1
    """Another writer's copy was first; the extent is still the caller's reservation."""
    STALE: Final = 2
    """It was not the caller's reservation (any more)."""


class Found(Message, frozen=True):
    """prefix: leading keys that are there; flags: a byte (0 or 1) a key if asked for."""

    prefix: int
    flags: bytes = b""


class Acquired(Message, frozen=True):
    """`extents` (packed EXTENT, length = the chunk's bytes) of the keys found; flags as in `Found` unless
    prefix.

    lease_ms: how long it holds, counted from before the request was sent; 0 for a pin.
    """

    extents: bytes
    flags: bytes
    lease_ms: int


class Offered(Message, frozen=True):
    """`sources` (packed EXTENT, length = the chunk's bytes), pinned under this request, to be copied.

    targets (packed EXTENT): where to, reserved under this request; none: to the lower tiers. keys, layouts:
    packed, of each source. ttls_ms (packed i64): what each has to live; 0: no end.
    """

    sources: bytes
    targets: bytes
    keys: bytes
    layouts: bytes
    ttls_ms: bytes


class ChunkRow(msgspec.Struct, frozen=True, array_like=True):
    """One replica of one chunk, for people and programs."""

    key: bytes
    namespace: bytes
    layout: bytes
    segment: int
    offset: int
    length: int
    idle_s: float
    expires_s: float | None
    pins: int
    leases: int


class Listed(Message, frozen=True):
    """Rows, and the cursor of the next page (0: that was all)."""

    rows: list[ChunkRow]
    cursor: int


class SegmentRow(msgspec.Struct, frozen=True, array_like=True):
    """One segment: identity, holder, fill."""

    segment: int
    segment_id: bytes
    incarnation: int
    device: str
    rank: int
    session: int
    size: int
    committed_bytes: int
    reserved_bytes: int
    free_bytes: int
    held: bool


class SessionRow(msgspec.Struct, frozen=True, array_like=True):
    """One session: who it is and what it holds."""

    session: int
    pid: int
    name: str
    reservations: int
    leases: int
    pins: int
    here: bool


class Statistics(Message, frozen=True):
    """Flat counters and gauges; segments; sessions; labels by digest in hex."""

    counters: dict[str, float]
    segments: list[SegmentRow]
    sessions: list[SessionRow]
    labels: dict[str, str]


class ErrorCode:
    """Why a request was refused; the text beside it says it in words."""

    VERSION: Final = "version"
    MALFORMED: Final = "malformed"
    OVERSIZED: Final = "oversized"
    TOKEN: Final = "token"
    EPOCH: Final = "epoch"
    STALE: Final = "stale"
    ARGUMENT: Final = "argument"
    LIMIT: Final = "limit"
    DRAINING: Final = "draining"
    FOREIGN: Final = "foreign"
    GONE: Final = "gone"
    INTERNAL: Final = "internal"


class Error(Message, frozen=True):
    """The request was refused and changed nothing."""

    code: str
    message: str


Reply: TypeAlias = (
    Pong | Done | Reserved | Committed | Found | Acquired | Offered | Listed | Statistics | Error
)


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """A request's frame: read the version before anything else, then who sends it to which server."""

    version: int
    rid: int
    session: int
    token: bytes
    epoch: int
    body: msgspec.Raw


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """A reply's frame."""

    version: int
    rid: int
    body: msgspec.Raw
