"""Writing to the pool: the right to write, and making visible what was written."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec
import numpy as np

from vcache.client.grants import Reservation, handles_of, pack, read_reserved
from vcache.client.ledger import Handle
from vcache.client.requests import CONNECTION_LOST, Requests, checked_layout, packed_keys
from vcache.errors import ArgumentError, RemoteProtocolError, ServerError, Unavailable
from vcache.limits import KEY_BYTES, NAMESPACE_BYTES
from vcache.protocol import Abort, Commit, Committed, Done, Extents, Outcome, Reserve, Reserved

_log = logging.getLogger(__name__)


class Writing:
    """The writing half of `Client`."""

    _requests: Requests

    def reserve(
        self, keys: Sequence[bytes], *, layout: bytes, size: int, near: int = 0, patient: bool = False
    ) -> Reservation:
        """The right to write one extent of at least `size` bytes for each key that is not there yet, as far
        as they fit.

        near: the segment to prefer. patient: nothing, and how much is coming, while chunks that have to go
        for it are still being copied. Ends by `commit` or `abort`.
        """
        if not keys:
            raise ArgumentError("keys", "none", "at least one")
        return self._reserve(Reserve(checked_layout(layout), size, packed_keys(keys), 0, near, patient))

    def reserve_blank(
        self, count: int, *, layout: bytes, size: int, near: int = 0, patient: bool = False
    ) -> Reservation:
        """The right to write `count` extents whose keys are bound at commit, as far as they fit; else as
        `reserve`.
        """
        if count < 1:
            raise ArgumentError("count", count, "at least 1")
        return self._reserve(Reserve(checked_layout(layout), size, b"", count, near, patient))

    def _reserve(self, request: Reserve) -> Reservation:
        if not 0 < request.size < 1 << 32:
            raise ArgumentError("size", request.size, "1 to 4294967295 bytes")
        connection = self._requests.connection()
        ledger = self._requests.ledger
        rid = ledger.begin(connection.line)
        try:
            reply = self._requests.exchange(connection, request, rid, Reserved)
            reservation = read_reserved(reply, connection, request)
            if not ledger.book_reservation(rid, handles_of(reservation.extents)):
                raise Unavailable(CONNECTION_LOST)
            return reservation
        except RemoteProtocolError as error:
            self._requests.malformed(error)
        finally:
            ledger.finish(rid)

    def commit(
        self,
        extents: Extents,
        keys: Sequence[bytes],
        lengths: Sequence[int],
        *,
        namespace: bytes,
        ttl_ms: int = -1,
        replica: bool = False,
        keep_lost: bool = False,
    ) -> bytes:
        """Make reserved extents visible under keys, `lengths[i]` bytes of each; one `Outcome` an extent.

        extents: as granted, completely written, the copy really finished. After this call the caller touches
        none of them again, whatever it raises; only with `keep_lost` those that were LOST are still reserved
        and the caller's. ttl_ms: -1 the server's default, 0 never expires. replica: keep it beside a copy in
        another segment.
        """
        handles = handles_of(extents)
        try:
            if not len(handles) == len(keys) == len(lengths):
                wanted = f"as many as keys ({len(keys)}) and lengths ({len(lengths)})"
                raise ArgumentError("extents", f"{len(handles)} extents", wanted)
            if len(namespace) != NAMESPACE_BYTES:
                raise ArgumentError("namespace", f"{len(namespace)} bytes", f"{NAMESPACE_BYTES} bytes")
            request = Commit(b"", packed_keys(keys), _packed_lengths(lengths), namespace, ttl_ms, replica)
            outcomes = self._commit(handles, request)
        except BaseException:
            self.abort(
                extents
            )  # those whose fate the server may have decided are not ours any more: they are passed over
            raise
        if not keep_lost and Outcome.LOST in outcomes:
            self.abort(extents[np.frombuffer(outcomes, np.uint8) == Outcome.LOST])
        return outcomes

    def _commit(self, handles: list[Handle], request: Commit) -> bytes:
        """Send a commit of those extents that are of this tenure; the others are stale."""
        connection = self._requests.connection()
        ours = [stamp >> 32 == connection.tenure for _, stamp in handles]
        if not all(ours):
            return self._commit_ours(ours, handles, request)
        ledger = self._requests.ledger
        request = msgspec.structs.replace(request, handles=pack(handles))
        rid = ledger.begin(connection.line, tuple(handles))
        try:
            outcomes = self._requests.exchange(connection, request, rid, Committed).outcomes
            if len(outcomes) != len(handles) or max(outcomes, default=0) > Outcome.STALE:
                raise RemoteProtocolError(
                    f"committed: got {len(outcomes)} outcomes for {len(handles)} extents"
                )
            ended = [handle for handle, what in zip(handles, outcomes, strict=True) if what != Outcome.LOST]
            if not ledger.book_commit(rid, ended):
                raise Unavailable(CONNECTION_LOST)
            return outcomes
        except RemoteProtocolError as error:
            self._requests.malformed(error)
        finally:
            ledger.finish(rid)

    def _commit_ours(self, ours: list[bool], handles: list[Handle], request: Commit) -> bytes:
        outcomes = np.full(len(handles), Outcome.STALE, np.uint8)
        at = np.flatnonzero(ours)
        if len(at):
            keys = np.frombuffer(request.keys, f"V{KEY_BYTES}")[at].tobytes()
            lengths = np.frombuffer(request.lengths, "<u8")[at].tobytes()
            part = msgspec.structs.replace(request, keys=keys, lengths=lengths)
            outcomes[at] = np.frombuffer(self._commit([handles[i] for i in at.tolist()], part), np.uint8)
        return outcomes.tobytes()

    def abort(self, extents: Extents) -> None:
        """Give reserved extents back; no copy into them runs any more. Never fails: what gets lost is mended
        by itself.
        """
        self._requests.breaker.check_usable()
        owned = self._requests.ledger.drop_reserved(handles_of(extents))
        connection = self._requests.breaker.connection
        if connection is None:
            return  # the next session declares without them
        owned = [handle for handle in owned if handle[1] >> 32 == connection.tenure]
        if not owned:
            return
        try:
            self._requests.ask(Abort(pack(owned)), Done, connection)
        except (Unavailable, ServerError) as error:
            self._requests.counters["aborts_unanswered"] += 1
            _log.debug("abort of %d extents: %s; the next declaration gives them back", len(owned), error)


def _packed_lengths(lengths: Sequence[int]) -> bytes:
    try:
        return np.asarray(lengths, np.uint64).astype("<u8").tobytes()
    except (OverflowError, TypeError, ValueError) as error:
        raise ArgumentError("lengths", error, "numbers of bytes") from error
