"""The session's own channel: declarations at intervals. Their answers are also what closes the breaker."""

from __future__ import annotations

import logging

import zmq

from vcache.client.breaker import Breaker
from vcache.client.channel import Connection
from vcache.client.ledger import Ledger
from vcache.client.requests import NEW_SESSION
from vcache.errors import Unavailable
from vcache.limits import RECONNECT_PAUSE_MAX_S, RECONNECT_PAUSE_MIN_S
from vcache.protocol import Error, decode_answer, decode_reply, encode_request

_log = logging.getLogger(__name__)


class Control:
    """Declares what the ledger says, every `interval_s` and as long as the breaker is open. Used by the
    session's thread.

    One declaration is under way at a time; it is sent again, seldom, until it is answered: its being old does
    no harm.
    """

    def __init__(self, connection: Connection, ledger: Ledger, breaker: Breaker, interval_s: float) -> None:
        self._connection = connection
        self._ledger = ledger
        self._breaker = breaker
        self._interval_s = interval_s
        self._channel = connection.new_channel()
        self._rid = 0
        self._frame = b""
        self._sent_s = 0.0
        self._due_s = 0.0
        self._pause_s = RECONNECT_PAUSE_MIN_S

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """For poll."""
        return self._channel.socket

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def turn(self, now_s: float) -> float:
        """Read answers, send what is due; returns when there is something to do again without an answer.

        Raises Unavailable if the session has to be established anew, RemoteProtocolError.
        """
        self._receive(now_s)
        tripped = self._breaker.connection is None and not self._breaker.is_shut
        if not self._rid and (now_s >= self._due_s or tripped):
            self._declare()
        if self._rid and now_s >= self._due_s:
            self._send(now_s)
        return self._due_s

    def _declare(self) -> None:
        self._rid = self._ledger.begin(self._connection.line)
        link = self._connection
        self._frame = encode_request(
            self._ledger.declaration(),
            rid=self._rid,
            session=link.session,
            token=link.token,
            epoch=link.epoch,
        )
        self._due_s = 0.0
        self._sent_s = 0.0
        self._pause_s = self._connection.timeout_ms / 1e3

    def _send(self, now_s: float) -> None:
        try:
            self._channel.socket.send(self._frame, zmq.NOBLOCK)
        except zmq.Again:  # not connected yet
            self._due_s = now_s + RECONNECT_PAUSE_MIN_S
            return
        if self._sent_s:
            self._breaker.trip(self._connection, "the metadata server does not answer")
            self._pause_s = min(2 * self._pause_s, max(RECONNECT_PAUSE_MAX_S, self._pause_s))
        self._sent_s = now_s
        self._due_s = now_s + self._pause_s

    def _receive(self, now_s: float) -> None:
        while True:
            try:
                answer = decode_answer(self._channel.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            if answer.rid != self._rid:
                continue
            self._ledger.finish(self._rid)
            self._rid = 0
            self._due_s = now_s + self._interval_s
            reply = decode_reply(answer.body)
            if isinstance(reply, Error):
                if reply.code in NEW_SESSION:
                    raise Unavailable(
                        f"the metadata server wants a new session: {reply.message} ({reply.code})"
                    )
                _log.error("the metadata server refused our declaration: %s (%s)", reply.message, reply.code)
            self._breaker.admit(self._connection)
