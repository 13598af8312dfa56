"""One request, from the breaker to the books: what all of `Client`'s calls share."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Final, NoReturn, TypeVar

from vcache.client.breaker import Breaker
from vcache.client.channel import Asked, Connection
from vcache.client.ledger import Ledger
from vcache.errors import ArgumentError, RemoteProtocolError, ServerError, Unavailable
from vcache.limits import FINGERPRINT_BYTES, KEY_BYTES, KEYS_PER_REQUEST_MAX
from vcache.protocol import Error, ErrorCode, Reply, Request, join_keys

_log = logging.getLogger(__name__)

R = TypeVar("R", bound=Reply)

CONNECTION_LOST: Final = "the connection to the metadata server was lost"

NEW_SESSION: Final = (
    ErrorCode.EPOCH,
    ErrorCode.TOKEN,
    ErrorCode.VERSION,
    ErrorCode.DRAINING,
    ErrorCode.GONE,
)
"""Refusals that say: not me, not now, not this session. The session's thread sees to it; the request is a
miss.
"""


class Requests:
    """Makes requests over the connection of now, and trips the breaker when there is no answer."""

    def __init__(self, breaker: Breaker, ledger: Ledger, counters: Counter[str]) -> None:
        self.breaker = breaker
        self.ledger = ledger
        self.counters = counters

    def connection(self) -> Connection:
        """The connection of now. Raises Unavailable, EngineClosed or ForkedProcess if there is none."""
        connection = self.breaker.connection
        if connection is None:
            self.breaker.refuse()
        return connection

    def ask(self, request: Request, kind: type[R], connection: Connection | None = None) -> R:
        """Make a request that grants nothing; its answer is of the type `kind`. Raises Unavailable,
        ServerError.
        """
        connection = connection or self.connection()
        rid = self.ledger.begin(connection.line)
        try:
            return self.exchange(connection, request, rid, kind)
        except RemoteProtocolError as error:
            self.malformed(error)
        finally:
            self.ledger.finish(rid)

    def exchange(self, connection: Connection, request: Request, rid: int, kind: type[R]) -> R:
        """Send a request that has begun and return its answer. Raises Unavailable, ServerError,
        RemoteProtocolError.
        """
        reply = self.settle(connection, self.send(connection, request, rid), request, kind)
        assert reply is not None
        return reply

    def send(self, connection: Connection, request: Request, rid: int) -> Asked:
        """Send a request that has begun. Raises Unavailable."""
        try:
            return connection.begin(request, rid)
        except Unavailable as error:
            self._unanswered(connection, error)
            raise

    def settle(
        self,
        connection: Connection,
        asked: Asked,
        request: Request,
        kind: type[R],
        within_s: float = math.inf,
    ) -> R | None:
        """The answer to what was sent; None if it has not come after `within_s`. Raises as `exchange`."""
        try:
            reply = asked.reply(within_s)
        except Unavailable as error:
            self._unanswered(connection, error)
            raise
        if reply is None or type(reply) is kind:
            return reply
        if not isinstance(reply, Error):
            raise RemoteProtocolError(f"got {type(reply).__name__} in answer to {type(request).__name__}")
        self.counters["requests_refused"] += 1
        if reply.code in NEW_SESSION:
            self.breaker.trip(
                connection, f"the metadata server refused a request: {reply.message} ({reply.code})"
            )
            raise Unavailable(reply.message)
        raise ServerError(reply.code, reply.message)

    def _unanswered(self, connection: Connection, error: Unavailable) -> None:
        self.counters["requests_unanswered"] += 1
        self.breaker.trip(connection, str(error))

    def malformed(self, error: RemoteProtocolError) -> NoReturn:
        """Count and log an answer that cannot be so; for the caller it is no answer."""
        self.counters["protocol_errors"] += 1
        if self.counters["protocol_errors"] == 1:
            _log.error(
                "the metadata server sent something malformed (further ones are only counted): %s", error
            )
        raise Unavailable(f"the metadata server sent something malformed: {error}") from error


def packed_keys(keys: Sequence[bytes]) -> bytes:
    """Keys as they travel. Raises ArgumentError for a wrong type, length or number."""
    if len(keys) > KEYS_PER_REQUEST_MAX:
        raise ArgumentError("keys", f"{len(keys)} keys", f"at most {KEYS_PER_REQUEST_MAX}")
    try:
        joined = b"".join(keys)
        if len(joined) == KEY_BYTES * len(keys) and {KEY_BYTES}.issuperset(map(len, keys)):
            return joined
        return join_keys(list(keys))  # says which one is wrong
    except TypeError as error:
        raise ArgumentError("keys", error, "a sequence of bytes") from error


def checked_layout(layout: bytes) -> bytes:
    """A layout fingerprint. Raises ArgumentError for a wrong length."""
    if len(layout) != FINGERPRINT_BYTES:
        raise ArgumentError("layout", f"{len(layout)} bytes", f"{FINGERPRINT_BYTES} bytes")
    return layout
