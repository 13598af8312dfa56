"""What clients ask of the metadata server."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from vcache.protocol.base import Message


class Ping(Message, frozen=True):
    """Answered with `Pong`; changes nothing."""


class Reserve(Message, frozen=True):
    """Grant extents to write: for those of `keys` that are not there yet, in order, or `count` without keys.

    size: bytes of one chunk. near: segment number to prefer (0: none). Fewer may be granted than asked.
    patient: rather nothing now than what somebody is still copying before it goes (`Reserved.coming`).
    """

    layout: bytes
    size: int
    keys: bytes = b""
    count: int = 0
    near: int = 0
    patient: bool = False


class Commit(Message, frozen=True):
    """Bind `keys[i]` to the reserved extent `handles[i]` of `lengths[i]` bytes and make it visible.

    lengths: packed u64. ttl_ms: -1 the server's default, 0 never expires. replica: keep it beside copies in
    other segments.
    """

    handles: bytes
    keys: bytes
    lengths: bytes
    namespace: bytes
    ttl_ms: int = -1
    replica: bool = False


class Abort(Message, frozen=True):
    """Give reserved extents back; nothing of the caller will touch them again."""

    handles: bytes


class Lookup(Message, frozen=True):
    """Count the leading keys that are there; with `bitmap`, say so of each key. Touches nothing."""

    keys: bytes
    layout: bytes
    bitmap: bool = False


class Contains(Message, frozen=True):
    """Say of each key whether it is there, whatever its layout. Touches nothing."""

    keys: bytes


class Acquire(Message, frozen=True):
    """Grant the right to read: the longest prefix of `keys` that is there, or (prefix=False) each that is
    there.

    pin: a right without a deadline; otherwise a lease. near: segment to read from if there are several
    replicas.
    """

    keys: bytes
    layout: bytes
    pin: bool = False
    prefix: bool = True
    near: int = 0


class Release(Message, frozen=True):
    """End the right that request `right` was granted, wholly or for `handles`. Not answered."""

    right: int
    handles: bytes = b""


class Offers(Message, frozen=True):
    """Ask for chunks to copy before they are evicted; the sender is told of further ones from now on.

    below: chunks to write to lower tiers; else those to copy between segments, one of which is the sender's.
    limit: 0 takes none and withdraws: no more are to be offered to this session.
    """

    below: bool
    limit: int


class Moved(Message, frozen=True):
    """End one copy that request `right` gave out: its source is read no more, nor its target written.

    source, target: packed HANDLE, one each; target empty: it was for the lower tiers. done: whether it is
    there now, byte for byte.
    """

    right: int
    source: bytes
    target: bytes
    done: bool


class Touch(Message, frozen=True):
    """Count the keys as used now, the first one as the most recent."""

    keys: bytes


class Remove(Message, frozen=True):
    """Forget these chunks at once; the memory of one that is pinned is freed at the last release."""

    keys: bytes


class Clear(Message, frozen=True):
    """Forget all chunks, or those of one namespace."""

    namespace: bytes = b""


class List(Message, frozen=True):
    """A page of the directory, from a cursor that an earlier page gave (0: from the start)."""

    cursor: int = 0
    limit: int = 100


class Describe(Message, frozen=True):
    """Names for people to read: of a layout fingerprint or of a namespace."""

    digest: bytes
    label: str


class Right(msgspec.Struct, frozen=True, array_like=True):
    """A pin that a client holds: the request that was granted it, and what is left of it."""

    rid: int
    handles: bytes


class Declare(Message, frozen=True):
    """All that this session owns; what it was granted by requests up to `settled` and does not name is freed.

    settled: the caller has processed, or will for ever ignore, every answer to requests up to this one.
    """

    settled: int
    reservations: bytes
    pins: list[Right]


class Stats(Message, frozen=True):
    """Counters, segments and sessions."""


class Check(Message, frozen=True):
    """Prove that extents do not overlap and nothing leaks; answered with `Done` or the error "internal"."""


class Shutdown(Message, frozen=True):
    """End the server as SIGTERM does."""


Request: TypeAlias = (
    Ping
    | Reserve
    | Commit
    | Abort
    | Lookup
    | Contains
    | Acquire
    | Release
    | Offers
    | Moved
    | Touch
    | Remove
    | Clear
    | List
    | Describe
    | Declare
    | Stats
    | Check
    | Shutdown
)
