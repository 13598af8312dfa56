"""One chunk as lower tiers keep it: a header that says what the bytes are, then the bytes.

    0    8   magic
    8    2   version
    10   2   length of the header
    12   4   zero
    16  16   layout fingerprint
    32  32   chunk key
    64   8   length of the chunk
    72   8   creation, milliseconds since 1970
    80   8   expiry, the same; 0: none of its own
    88   8   XXH3 of the XXH3s (8 bytes each, big-endian) of the chunk's pieces of 1 MiB
    96  24   zero
    120  8   XXH3 of all of the header before

All other numbers little-endian. A process that knows nothing of the past reads it, and takes nothing for a
chunk that is not exactly what was put: see `flaw_of`. Pieces have checksums of their own so that several
threads can verify one chunk. A record of another version is no chunk. No I/O and no clock here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import Enum
from typing import Any, Final, NamedTuple, TypeAlias

import xxhash

from vcache.limits import FINGERPRINT_BYTES, KEY_BYTES, RECORD_HEADER_BYTES, RECORD_PIECE_BYTES
from vcache.tiers.base import has_expired as has_expired

_MAGIC: Final = b"VCACHREC"
_VERSION: Final = 3
_FIELDS: Final = struct.Struct(f"<8sHHI{FINGERPRINT_BYTES}s{KEY_BYTES}sQQQQ24x")
_CHECK: Final = struct.Struct("<Q")

assert _FIELDS.size + _CHECK.size == RECORD_HEADER_BYTES

Bytes: TypeAlias = Any
"""Whatever has the buffer protocol: typeshed names it in no way that Python 3.10 knows."""


class Flaw(Enum):
    """Why a record is not the chunk that was asked for; all but EXPIRED mean that it is of no use at all."""

    NOT_OURS = "not a chunk record"
    VERSION = "a record of another version"
    HEADER = "a damaged header"
    KEY = "another chunk's record"
    LAYOUT = "a record of another layout"
    LENGTH = "a record of another length"
    CHUNK = "damaged bytes"
    EXPIRED = "expired"


class Header(NamedTuple):
    """What a record says of its chunk. Times in milliseconds since 1970."""

    layout: bytes
    key: bytes
    length: int
    created_ms: int
    expires_ms: int
    checksum: int

    def pack(self) -> bytes:
        """RECORD_HEADER_BYTES bytes."""
        fields = _FIELDS.pack(
            _MAGIC,
            _VERSION,
            RECORD_HEADER_BYTES,
            0,
            self.layout,
            self.key,
            self.length,
            self.created_ms,
            self.expires_ms,
            self.checksum,
        )
        return fields + _CHECK.pack(xxhash.xxh3_64_intdigest(fields))

    def expiry_ms(self, ttl_s: float) -> int:
        """When it expires: by its own time or `ttl_s` after its creation (0: never), the earlier; 0: never.

        The time to live is the tier's as it is now, not as it was when the chunk was put.
        """
        by_age = self.created_ms + int(ttl_s * 1000) if ttl_s else 0
        given = [moment for moment in (self.expires_ms, by_age) if moment]
        return min(given, default=0)


def header_for(key: bytes, layout: bytes, chunk: Bytes, created_ms: int, expires_ms: int = 0) -> Header:
    """The header of a chunk (contiguous bytes) that is put now."""
    return Header(layout, key, len(chunk), created_ms, expires_ms, _checksum(chunk))


def piece_checksum(piece: Bytes) -> bytes:
    """What `checksum_of_pieces` wants of each RECORD_PIECE_BYTES of a chunk, and of the rest."""
    return xxhash.xxh3_64_digest(piece)


def checksum_of_pieces(checksums: Iterable[bytes]) -> int:
    """A chunk's checksum from those of its pieces, in their order."""
    return xxhash.xxh3_64_intdigest(b"".join(checksums))


def _checksum(chunk: Bytes) -> int:
    pieces = range(0, len(chunk), RECORD_PIECE_BYTES)
    return checksum_of_pieces(piece_checksum(chunk[at : at + RECORD_PIECE_BYTES]) for at in pieces)


def read_header(raw: bytes) -> Header | Flaw:
    """The header at the beginning of `raw`, or what is wrong with it."""
    if len(raw) < RECORD_HEADER_BYTES or raw[: len(_MAGIC)] != _MAGIC:
        return Flaw.NOT_OURS
    _, version, length, _, *fields = _FIELDS.unpack_from(raw)
    if version != _VERSION or length != RECORD_HEADER_BYTES:
        return Flaw.VERSION
    if _CHECK.unpack_from(raw, _FIELDS.size)[0] != xxhash.xxh3_64_intdigest(raw[: _FIELDS.size]):
        return Flaw.HEADER
    return Header(*fields)


def flaw_in_header(header: Header, key: bytes, layout: bytes, length: int) -> Flaw | None:
    """What keeps a record with this header from being the chunk of `key`, whatever its bytes are."""
    if header.key != key:
        return Flaw.KEY
    if header.layout != layout:
        return Flaw.LAYOUT
    return Flaw.LENGTH if header.length != length else None


def flaw_of(header: Header, key: bytes, layout: bytes, chunk: Bytes) -> Flaw | None:
    """What keeps `chunk`, read together with `header`, from being the chunk of `key`; None: it is that."""
    flaw = flaw_in_header(header, key, layout, len(chunk))
    if flaw is None and header.checksum != _checksum(chunk):
        return Flaw.CHUNK
    return flaw
