"""What clients and the metadata server say to each other: messages and their encoding, no I/O.

Two channels carry it (docs/architecture.md):

- **requests** over ZeroMQ (DEALER → ROUTER), one frame a message: an `Envelope` around a `Request`; the
  answer is an `Answer` around a `Reply`. `rid`, chosen by the client and rising, makes a request idempotent
  and names the right (lease or pin) that an acquire grants. `Release` has no answer.
- **sessions** over a SOCK_SEQPACKET Unix socket: `FromClient` and `FromServer`, some of them with descriptors
  (SCM_RIGHTS).

Messages are msgspec structs as MessagePack arrays. Arrays of extents and keys travel packed: many small
structs would cost more than the request itself.
"""

from __future__ import annotations

import struct
from typing import Any, Final, TypeAlias, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from vcache.errors import ArgumentError, RemoteProtocolError
from vcache.limits import FRAME_BYTES_MAX, KEY_BYTES

PROTOCOL_VERSION: Final = 1

EXTENT: Final = np.dtype(
    [
        ("index", "<u4"),
        ("generation", "<u4"),
        ("segment", "<u4"),
        ("reserved", "<u4"),
        ("offset", "<u8"),
        ("length", "<u8"),
    ]
)
"""An extent on the wire: where it is, and the generation under which it was granted (32 bytes)."""

HANDLE: Final = np.dtype([("index", "<u4"), ("generation", "<u4")])
"""An extent as its owner names it: a late or repeated message about an older generation changes nothing (8
bytes).
"""

Extents = NDArray[np.void]
Handles = NDArray[np.void]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages: immutable, encoded as an array that begins with its name."""


# ----------------------------------------------------------------------------------------------------
# requests


class Ping(Message, frozen=True):
    """Answered with `Pong`; changes nothing."""


class Reserve(Message, frozen=True):
    """Grant extents to write: for those of `keys` that are not there yet, in order, or `count` without keys.

    size: bytes of one chunk. near: segment number to prefer (0: none). Fewer may be granted than asked.
    """

    layout: bytes
    size: int
    keys: bytes = b""
    count: int = 0
    near: int = 0


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

# ---------------------------------------------------------------------------------------------------- replies


class Pong(Message, frozen=True):
    """The server is there."""

    pid: int


class Done(Message, frozen=True):
    """It is done; `count` is of what the request counts."""

    count: int = 0


class Reserved(Message, frozen=True):
    """`extents` (packed EXTENT, length = room), in the order of the keys whose bit in `present` is 0.

    wanted: how many were missing. Less was granted when len(extents) < wanted: that much fitted.
    """

    extents: bytes
    present: bytes
    wanted: int


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


Reply: TypeAlias = Pong | Done | Reserved | Committed | Found | Acquired | Listed | Statistics | Error


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


# ----------------------------------------------------------------------------------------------------
# sessions


class Hello(Message, frozen=True):
    """First message of a connection; one descriptor: a pidfd of the sender, who holds the session's lock.

    session: random, chosen by the client, kept when it comes back to a restarted server.
    lineage: of the table that it knows (0: none).
    """

    version: int
    session: int
    lineage: int
    name: str


class Attach(Message, frozen=True):
    """Lend a segment to the pool; descriptor: its own description, with its memfd where it has one."""

    seq: int
    descriptor: bytes
    segment_id: bytes
    incarnation: int
    device: str
    size: int
    data_offset: int
    rank: int = 0


class Detach(Message, frozen=True):
    """Take a segment back; answered with `Detached` when no importer maps it any more."""

    seq: int
    segment: int


class Open(Message, frozen=True):
    """Ask for a peer's segment; answered with `Opened` and its memfd where it has one."""

    seq: int
    segment: int


class Unmapped(Message, frozen=True):
    """The sender maps this segment no more (or does not, if it never did)."""

    segment: int


class Bye(Message, frozen=True):
    """The session ends; the sender has no copy running and touches no extent again."""


class Welcome(Message, frozen=True):
    """Answer to `Hello`; one descriptor: the extent table, read-only.

    resumed: what the session owned is still its own, to be declared now. Otherwise it owns nothing, and
    segments that it lent need new memory: writers of the old table may be asleep.
    """

    version: int
    epoch: int
    lineage: int
    token: bytes
    resumed: bool
    pid: int


class Attached(Message, frozen=True):
    """The segment's number, never used twice in one lineage."""

    seq: int
    segment: int


class Detached(Message, frozen=True):
    """No importer maps the segment any more: its memory may be freed."""

    seq: int
    segment: int


class Opened(Message, frozen=True):
    """A peer's segment: to be verified against its own header when mapped."""

    seq: int
    segment: int
    descriptor: bytes


class Gone(Message, frozen=True):
    """Notice: this segment's incarnation has ended; unmap it and answer `Unmapped` when no copy runs."""

    segment: int


class Refused(Message, frozen=True):
    """Answer to a session message that the server does not grant (seq 0: the connection itself)."""

    seq: int
    code: str
    message: str


FromClient: TypeAlias = Hello | Attach | Detach | Open | Unmapped | Bye
FromServer: TypeAlias = Welcome | Attached | Detached | Opened | Gone | Refused

# ----------------------------------------------------------------------------------------------------
# encoding

encode = msgspec.msgpack.Encoder().encode
_decode_envelope = msgspec.msgpack.Decoder(Envelope)
_decode_answer = msgspec.msgpack.Decoder(Answer)
_decode_request: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_decode_reply: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_decode_from_client: msgspec.msgpack.Decoder[FromClient] = msgspec.msgpack.Decoder(FromClient)
_decode_from_server: msgspec.msgpack.Decoder[FromServer] = msgspec.msgpack.Decoder(FromServer)

_Decoded = TypeVar("_Decoded")


def _decode(decoder: msgspec.msgpack.Decoder[_Decoded], frame: bytes | memoryview | msgspec.Raw) -> _Decoded:
    if len(memoryview(frame)) > FRAME_BYTES_MAX:
        raise RemoteProtocolError(
            f"a message of {len(memoryview(frame))} bytes, wanted at most {FRAME_BYTES_MAX}"
        )
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(str(error)) from error


def decode_envelope(frame: bytes | memoryview) -> Envelope:
    """The frame around a request. Raises RemoteProtocolError."""
    return _decode(_decode_envelope, frame)


def decode_request(body: msgspec.Raw | bytes) -> Request:
    """The request inside an envelope of our version. Raises RemoteProtocolError."""
    return _decode(_decode_request, body)


def decode_answer(frame: bytes | memoryview) -> Answer:
    """The frame around a reply. Raises RemoteProtocolError."""
    return _decode(_decode_answer, frame)


def decode_reply(body: msgspec.Raw | bytes) -> Reply:
    """The reply inside an answer of our version. Raises RemoteProtocolError."""
    return _decode(_decode_reply, body)


def decode_from_client(packet: bytes) -> FromClient:
    """A session message at the server. Raises RemoteProtocolError."""
    return _decode(_decode_from_client, packet)


def decode_from_server(packet: bytes) -> FromServer:
    """A session message at the client. Raises RemoteProtocolError."""
    return _decode(_decode_from_server, packet)


def encode_request(request: Request, *, rid: int, session: int, token: bytes, epoch: int) -> bytes:
    """The frame of one request."""
    return encode(Envelope(PROTOCOL_VERSION, rid, session, token, epoch, msgspec.Raw(encode(request))))


def encode_answer(reply: Reply, *, rid: int) -> bytes:
    """The frame of one reply."""
    return encode(Answer(PROTOCOL_VERSION, rid, msgspec.Raw(encode(reply))))


def split_keys(keys: bytes) -> list[bytes]:
    """The keys packed in `keys`. Raises RemoteProtocolError unless they fill KEY_BYTES each."""
    if len(keys) % KEY_BYTES:
        raise RemoteProtocolError(f"keys: got {len(keys)} bytes, wanted a multiple of {KEY_BYTES}")
    return list(struct.unpack(f"{KEY_BYTES}s" * (len(keys) // KEY_BYTES), keys))


def join_keys(keys: list[bytes]) -> bytes:
    """Pack keys for a request. Raises ArgumentError naming the first key of a wrong type or length."""
    joined = b"".join(keys)
    if len(joined) != KEY_BYTES * len(keys) or any(len(key) != KEY_BYTES for key in keys):
        at = next(i for i, key in enumerate(keys) if len(key) != KEY_BYTES)
        raise ArgumentError(f"keys[{at}]", f"{len(keys[at])} bytes", f"{KEY_BYTES} bytes")
    return joined


def unpack(packed: bytes, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A read-only array over packed records. Raises RemoteProtocolError if their length does not fit."""
    if len(packed) % dtype.itemsize:
        raise RemoteProtocolError(f"got {len(packed)} bytes, wanted a multiple of {dtype.itemsize}")
    return np.frombuffer(packed, dtype=dtype)


def pack_handles(index: Any, generation: Any) -> bytes:
    """Pack indices and generations (sequences or arrays of equal length) as HANDLE records."""
    handles = np.empty(len(index), dtype=HANDLE)
    handles["index"] = index
    handles["generation"] = generation
    return handles.tobytes()
