"""Copies that this process makes so that nothing is lost by eviction: what to copy, and its end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vcache.client.channel import Connection
from vcache.client.grants import Grant, handles_of, pack, read_extents
from vcache.client.requests import CONNECTION_LOST, Requests
from vcache.errors import RemoteProtocolError, Unavailable
from vcache.limits import FINGERPRINT_BYTES, OFFERS_PER_REQUEST_MAX
from vcache.protocol import Done, Extents, Moved, Offered, Offers, split_keys


@dataclass(frozen=True, eq=False)
class Move:
    """One chunk to copy: `source`, pinned, to the reserved `target`, or without one to the lower tiers.

    ttl_ms: what it has to live; 0: no end. Ends by `Client.moved`, once nothing reads or writes them.
    """

    source: Grant
    target: Extents | None
    key: bytes
    layout: bytes
    ttl_ms: int


class Moving:
    """The copying part of `Client`."""

    _requests: Requests

    def offers(self, *, below: bool, limit: int = OFFERS_PER_REQUEST_MAX) -> list[Move]:
        """Chunks to copy now: to lower tiers (below), or from or to the segment that this process lends.

        From now on `wait_offers` tells when there are more; limit 0: none now, and no more.
        """
        connection = self._requests.connection()
        ledger = self._requests.ledger
        rid = ledger.begin(connection.line)
        try:
            reply = self._requests.exchange(connection, Offers(below, limit), rid, Offered)
            moves = _read_offered(reply, connection, rid, below)
            pinned = [handle for move in moves for handle in handles_of(move.source.extents)]
            targets = [move.target for move in moves if move.target is not None]
            reserved = [handle for target in targets for handle in handles_of(target)]
            if not ledger.book_offers(rid, pinned, reserved):
                raise Unavailable(CONNECTION_LOST)
            return moves
        except RemoteProtocolError as error:
            self._requests.malformed(error)
        finally:
            ledger.finish(rid)

    def moved(self, move: Move, *, done: bool) -> bool:
        """End a copy; whether it counts now. Never fails: what gets lost is mended by itself."""
        self._requests.breaker.check_usable()
        ledger = self._requests.ledger
        source = handles_of(move.source.extents)
        target = [] if move.target is None else handles_of(move.target)
        ledger.drop_pin(move.source.right, source)
        connection = self._requests.breaker.connection
        if connection is None or connection.lineage != move.source.lineage:
            ledger.drop_reserved(target)
            return False
        try:
            rid = ledger.begin(connection.line, tuple(target))
        except Unavailable:  # the connection has just ended
            ledger.drop_reserved(target)
            return False
        try:
            request = Moved(move.source.right, pack(source), pack(target), done)
            counts = bool(self._requests.exchange(connection, request, rid, Done).count)
            ledger.book_commit(rid, target)
            return counts
        except Exception:  # whatever it is, the next declaration tells that we hold neither
            self._requests.counters["moves_unanswered"] += 1
            return False
        finally:
            ledger.finish(rid)


def _read_offered(reply: Offered, connection: Connection, rid: int, below: bool) -> list[Move]:
    """What is to be copied. Raises RemoteProtocolError if it cannot be so."""
    sources, targets = read_extents(reply.sources, connection), read_extents(reply.targets, connection)
    keys = split_keys(reply.keys)
    count = len(sources)
    sizes = (len(keys), len(reply.layouts) / FINGERPRINT_BYTES, len(reply.ttls_ms) / 8)
    if any(size != count for size in sizes) or len(targets) != (0 if below else count):
        raise RemoteProtocolError(f"offered: {count} sources, {len(targets)} targets, {sizes} of the rest")
    if len(targets) and bool((targets["length"] < sources["length"]).any()):
        raise RemoteProtocolError("offered: a target that is smaller than its source")
    ttls_ms = np.frombuffer(reply.ttls_ms, "<i8").tolist()
    moves = []
    for at, key in enumerate(keys):
        source = Grant(rid, sources[at : at + 1], None, float("inf"), connection.lineage, connection.table)
        target = targets[at : at + 1] if len(targets) else None
        layout = reply.layouts[at * FINGERPRINT_BYTES : (at + 1) * FINGERPRINT_BYTES]
        moves.append(Move(source, target, key, layout, ttls_ms[at]))
    return moves
