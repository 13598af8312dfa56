"""Messages to bytes and back; bytes that cannot be are refused."""

from __future__ import annotations

import struct
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from vcache.errors import ArgumentError, RemoteProtocolError
from vcache.limits import FRAME_BYTES_MAX, KEY_BYTES
from vcache.protocol.base import HANDLE, PROTOCOL_VERSION
from vcache.protocol.replies import Answer, Envelope, Reply
from vcache.protocol.requests import Request
from vcache.protocol.sessions import FromClient, FromServer

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
