"""Reading from the pool: what is there, the right to read it, and the fence that says whether the bytes
count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from vcache.client.grants import Grant, adopted, handles_of, pack, read_acquired
from vcache.client.requests import CONNECTION_LOST, Requests, checked_layout, packed_keys
from vcache.client.segments import Segments
from vcache.errors import RemoteProtocolError, Unavailable
from vcache.protocol import Acquire, Acquired, Contains, Extents, Found, Lookup, Release


class Acquiring:
    """A right to read that was asked for. Used by one thread at a time; whoever takes no result gives up."""

    def __init__(self, requests: Requests, request: Acquire) -> None:
        self._requests = requests
        self._request = request
        self._connection = connection = requests.connection()
        self._started_s = time.monotonic()
        self._rid = requests.ledger.begin(connection.line)
        try:
            self._asked = requests.send(connection, request, self._rid)
        except BaseException:
            requests.ledger.finish(self._rid)
            raise

    def result(self, within_s: float = math.inf) -> Grant | None:
        """What was granted; None if it has not come after `within_s`, and may be waited for again.

        Raises as `Client.acquire`; there is nothing to be waited for then.
        """
        requests, connection, rid = self._requests, self._connection, self._rid
        is_settled = True
        try:
            reply = requests.settle(connection, self._asked, self._request, Acquired, within_s)
            if reply is None:
                is_settled = False
                return None
            grant = read_acquired(reply, connection, self._request, rid, self._started_s)
            if self._request.pin and not requests.ledger.book_pin(rid, handles_of(grant.extents)):
                raise Unavailable(CONNECTION_LOST)
            return grant
        except RemoteProtocolError as error:
            requests.malformed(error)
        finally:
            if is_settled:
                requests.ledger.finish(rid)

    def give_up(self) -> None:
        """Take nothing: what is granted all the same comes back by itself."""
        self._asked.give_up()
        self._requests.ledger.finish(self._rid)


class Reading:
    """The reading half of `Client`."""

    _requests: Requests
    _segments: Segments

    def lookup(self, keys: Sequence[bytes], layout: bytes) -> int:
        """How many leading keys are in the pool, in this layout."""
        if not keys:
            self._requests.breaker.check_usable()
            return 0
        prefix = self._requests.ask(Lookup(packed_keys(keys), checked_layout(layout)), Found).prefix
        if not 0 <= prefix <= len(keys):
            self._requests.malformed(RemoteProtocolError(f"found: a prefix of {prefix} of {len(keys)} keys"))
        return prefix

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Of each key, whether it is in the pool, in whatever layout."""
        if not keys:
            self._requests.breaker.check_usable()
            return []
        flags = self._requests.ask(Contains(packed_keys(keys)), Found).flags
        if len(flags) != len(keys):
            self._requests.malformed(RemoteProtocolError(f"found: {len(flags)} flags for {len(keys)} keys"))
        return [bool(flag) for flag in flags]

    def acquire(
        self, keys: Sequence[bytes], *, layout: bytes, pin: bool = False, prefix: bool = True, near: int = 0
    ) -> Grant:
        """The right to read the leading keys that are there, or (prefix=False) each that is there.

        pin: a right without a deadline. near: the segment to prefer among replicas. Ends by `release`.
        """
        grant = self.begin_acquire(keys, layout=layout, pin=pin, prefix=prefix, near=near).result()
        assert grant is not None
        return grant

    def begin_acquire(
        self, keys: Sequence[bytes], *, layout: bytes, pin: bool = False, prefix: bool = True, near: int = 0
    ) -> Acquiring:
        """As `acquire`, to be waited for later; raises what stands against asking now."""
        request = Acquire(packed_keys(keys), checked_layout(layout), pin, prefix, near)
        return Acquiring(self._requests, request)

    def adopt(self, extents: bytes, lineage: int) -> Grant:
        """A grant that another process of this machine was given and holds: to read under it and ask the
        fence.

        extents: packed EXTENT records, as they were granted. Nothing is asked or held here; do not release
        it. Raises Unavailable if there is no connection to the server that granted it, RemoteProtocolError
        for impossible extents.
        """
        return adopted(extents, lineage, self._requests.connection())

    def intact(self, grant: Grant) -> bool:
        """Whether what was read under this grant is what was stored. **Call it when the copy has really
        finished.**

        True if every extent still has the generation that it was granted under, the table is in force, no
        segment has ended its incarnation, and the session has not been lost since.
        """
        self._requests.breaker.check_usable()
        extents = grant.extents
        if not grant.table.unchanged(extents["index"], extents["generation"]).all():
            return False
        segments = self._segments
        return all(segments.intact(number, grant.lineage) for number in set(extents["segment"].tolist()))

    def release(self, grant: Grant, part: Extents | None = None) -> None:
        """End the right to read, wholly or for `part` of its extents. Not answered; what gets lost is mended
        by itself.
        """
        self._requests.breaker.check_usable()
        handles = None if part is None else handles_of(part, "part")
        if not len(grant.extents) or (handles is not None and not handles):
            return
        if grant.pinned:
            self._requests.ledger.drop_pin(grant.right, handles)
        connection = self._requests.breaker.connection
        if connection is None or connection.lineage != grant.lineage:
            return
        try:
            rid = self._requests.ledger.begin(connection.line)
            sent = connection.tell(Release(grant.right, pack(handles or ())), rid)
            self._requests.ledger.finish(rid)
        except Unavailable:  # the connection has just ended
            sent = False
        if not sent:
            self._requests.counters["releases_unsent"] += 1
