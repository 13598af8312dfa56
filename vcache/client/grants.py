"""What the server granted: the right to write (Reservation) or to read (Grant), checked before anybody uses
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vcache.client.channel import Connection
from vcache.client.ledger import Handle
from vcache.errors import ArgumentError, RemoteProtocolError, Unavailable
from vcache.limits import KEY_BYTES
from vcache.protocol import EXTENT, Acquire, Acquired, Extents, Reserve, Reserved, pack_handles
from vcache.table import Standing, TableReader


@dataclass(frozen=True, eq=False)
class Reservation:
    """The right to write: `extents` (EXTENT records; length is the room in each), in the order of what is
    missing.

    present: of each key, whether it is there already (empty without keys). wanted: how many were missing;
    fewer extents mean that this much fitted. lineage: where `Client.segment` finds the segments. coming: see
    `Client.reserve`.
    """

    extents: Extents
    present: list[bool]
    wanted: int
    lineage: int
    coming: int = 0


@dataclass(frozen=True, eq=False)
class Grant:
    """The right to read: `extents` (EXTENT records; length is that of the chunk), in the order of the keys
    found.

    right: its name at the server. flags: of each key whether it is among them, None if the keys found are the
    leading ones. deadline_s: `time.monotonic()` at which a lease ends; infinite for a pin. Whatever it says,
    bytes count only if `Client.intact` says so after the copy (a pin, unless its session was lost, cannot
    break before it is released).
    """

    right: int
    extents: Extents
    flags: list[bool] | None
    deadline_s: float
    lineage: int
    table: TableReader = field(repr=False)

    @property
    def pinned(self) -> bool:
        """Whether it holds until it is released."""
        return self.deadline_s == float("inf")

    def standing(self, at: int) -> Standing:
        """What has become of the pinned chunk in `extents[at]`. Nobody is asked: it is in the extent table,
        before its remover hears that it was removed, and whether or not a server is there.
        """
        extent = self.extents[at]
        return self.table.standing(int(extent["index"]), int(extent["generation"]))


def read_reserved(reply: Reserved, connection: Connection, request: Reserve) -> Reservation:
    """What a reserve was granted. Raises RemoteProtocolError if it cannot be so."""
    extents = read_extents(reply.extents, connection)
    keys = len(request.keys) // KEY_BYTES
    wanted = reply.present.count(0) if keys else request.count
    if len(reply.present) != keys or reply.wanted != wanted or len(extents) > wanted:
        raise RemoteProtocolError(
            f"reserved: {len(extents)} extents, {reply.wanted} wanted, {len(reply.present)} flags "
            f"for {keys} keys and count {request.count}"
        )
    if len(extents) and int(extents["length"].min()) < request.size:
        raise RemoteProtocolError(f"reserved: {int(extents['length'].min())} bytes, wanted {request.size}")
    present = [bool(flag) for flag in reply.present]
    return Reservation(extents, present, wanted, connection.lineage, max(reply.coming, 0))


def read_acquired(
    reply: Acquired, connection: Connection, request: Acquire, rid: int, started_s: float
) -> Grant:
    """What an acquire was granted. Raises RemoteProtocolError if it cannot be so."""
    extents = read_extents(reply.extents, connection)
    keys = len(request.keys) // KEY_BYTES
    flags = None if request.prefix else [bool(flag) for flag in reply.flags]
    fits = len(extents) <= keys if flags is None else len(flags) == keys and sum(flags) == len(extents)
    if not fits or reply.lease_ms < 0:
        raise RemoteProtocolError(
            f"acquired: {len(extents)} extents and {len(reply.flags)} flags for {keys} keys"
        )
    deadline_s = float("inf") if request.pin else started_s + reply.lease_ms / 1e3
    return Grant(rid, extents, flags, deadline_s, connection.lineage, connection.table)


def adopted(extents: bytes, lineage: int, connection: Connection) -> Grant:
    """A grant that another session was given, to be read and never released here. Raises Unavailable,
    RemoteProtocolError.
    """
    if connection.lineage != lineage:
        raise Unavailable("the chunks were granted by a metadata server whose pool is gone")
    return Grant(0, read_extents(extents, connection), None, float("inf"), lineage, connection.table)


def handles_of(extents: Extents, argument: str = "extents") -> list[Handle]:
    """The extents as the ledger names them. Raises ArgumentError if they are no array of EXTENT records."""
    if not isinstance(extents, np.ndarray) or extents.dtype != EXTENT or extents.ndim != 1:
        raise ArgumentError(
            argument, type(extents).__name__, "a one-dimensional array of EXTENT records, as granted"
        )
    stamps = extents["reserved"].astype(np.uint64) << np.uint64(32) | extents["generation"]
    return list(zip(extents["index"].tolist(), stamps.tolist(), strict=True))


def pack(handles: Sequence[Handle]) -> bytes:
    """Handles as they travel."""
    return pack_handles([index for index, _ in handles], [stamp & 0xFFFF_FFFF for _, stamp in handles])


def read_extents(packed: bytes, connection: Connection) -> Extents:
    """Extents off the wire, stamped with the tenure; RemoteProtocolError for an index or bytes that cannot
    be.
    """
    if len(packed) % EXTENT.itemsize:
        raise RemoteProtocolError(f"extents: {len(packed)} bytes, wanted a multiple of {EXTENT.itemsize}")
    # As 32-bit words: index, generation, segment, reserved, offset (low, high), length (low, high). Two
    # passes over all columns cost less than one over each, and plain words less than records.
    words = np.frombuffer(bytearray(packed), "<u4").reshape(-1, 8)
    if len(words):
        largest, smallest = np.maximum.reduce(words).tolist(), np.minimum.reduce(words).tolist()
        if largest[0] >= connection.table.capacity or smallest[2] == 0:
            raise RemoteProtocolError("an extent that the table has no record of, or in no segment")
        if smallest[6] == 0 or largest[7]:
            raise RemoteProtocolError("an extent of no length, or longer than a chunk can be")
        if largest[5] >= 1 << 30:
            raise RemoteProtocolError("an extent at an impossible offset")
        words[:, 3] = connection.tenure
    extents: Extents = words.view(EXTENT).reshape(-1)
    return extents
