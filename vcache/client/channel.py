"""Requests to the metadata server: ZeroMQ DEALER channels, each used by one thread at a time.

An answer is recognised by its rid: late ones, of requests that were given up, are passed over. A request
without an answer is sent again with the same rid within its deadline; the server keeps its replies, so it is
carried out once.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field

import msgspec
import zmq

from vcache.errors import Unavailable
from vcache.limits import CHANNELS_IDLE_MAX, FRAME_BYTES_MAX, REQUEST_SENDS_MAX, REQUEST_SLICE_MS
from vcache.protocol import Reply, Request, decode_answer, decode_reply, encode_request
from vcache.table import TableReader

_log = logging.getLogger(__name__)


class Channel:
    """One DEALER socket. After an exception it is not used again."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, timeout_ms: int) -> None:
        self._timeout_s = timeout_ms / 1e3
        self._slice_ms = min(REQUEST_SLICE_MS, timeout_ms)
        self.socket = socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.immediate = 1  # a request never waits in a queue for a server that is not there
        socket.maxmsgsize = FRAME_BYTES_MAX
        socket.rcvtimeo = self._slice_ms
        socket.connect(endpoint)

    def close(self) -> None:
        """Close the socket; what was not sent yet is dropped."""
        self.socket.close()

    def post(self, frame: bytes) -> bool:
        """Send a request that is not answered; False if the socket takes none within a slice."""
        try:
            self.socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:  # a new channel takes a moment to connect
            if not self.socket.poll(self._slice_ms, zmq.POLLOUT):
                return False
            self.socket.send(frame, zmq.NOBLOCK)
        return True

    def exchange(self, frame: bytes, rid: int, connection: Connection) -> msgspec.Raw:
        """Send a request and return the body of its answer.

        Raises Unavailable after the timeout, or soon after the connection has ended; RemoteProtocolError.
        """
        started = time.monotonic()
        try:
            self.socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:  # a new channel takes a moment to connect
            return self._persist(frame, rid, connection, started, started)
        try:
            answer = decode_answer(self.socket.recv())
            if answer.rid == rid:
                return answer.body
        except zmq.Again:
            _log.debug("request %d takes longer than %d ms", rid, self._slice_ms)
        return self._persist(frame, rid, connection, started, started + self._timeout_s / REQUEST_SENDS_MAX)

    def _persist(
        self, frame: bytes, rid: int, connection: Connection, started: float, send_at: float
    ) -> msgspec.Raw:
        """Wait in slices, looking after each whether it still makes sense, and send again now and then."""
        deadline = started + self._timeout_s
        socket = self.socket
        while True:
            now = time.monotonic()
            if connection.ended:
                raise Unavailable("the connection to the metadata server was lost")
            if now >= deadline:
                raise Unavailable(f"the metadata server did not answer within {self._timeout_s * 1e3:.0f} ms")
            wait_ms = min(self._slice_ms, math.ceil((deadline - now) * 1e3))
            if now >= send_at:
                try:
                    socket.send(frame, zmq.NOBLOCK)
                except zmq.Again:
                    socket.poll(wait_ms, zmq.POLLOUT)
                    continue
                send_at = now + self._timeout_s / REQUEST_SENDS_MAX
            socket.rcvtimeo = wait_ms
            try:
                answer = decode_answer(socket.recv())
            except zmq.Again:
                continue
            if answer.rid == rid:
                socket.rcvtimeo = self._slice_ms
                return answer.body


@dataclass(eq=False)
class Connection:
    """An established session's way for requests: who we are to which server, and a pool of channels (last in,
    first out).

    line: the ledger's number of it. tenure: counts the sessions that were not resumed; what was granted in
    another one is void. ended: set by the session's thread when the server has gone; requests under way then
    fail soon.
    """

    context: zmq.Context[zmq.Socket[bytes]]
    endpoint: str
    timeout_ms: int
    session: int
    token: bytes
    epoch: int
    lineage: int
    line: int
    tenure: int
    table: TableReader
    server_pid: int
    ended: bool = False
    _idle: list[Channel] = field(default_factory=list)

    def ask(self, request: Request, rid: int) -> Reply:
        """Make a request and wait for its answer. Raises Unavailable, RemoteProtocolError."""
        frame = encode_request(request, rid=rid, session=self.session, token=self.token, epoch=self.epoch)
        channel = self._take()
        try:
            body = channel.exchange(frame, rid, self)
        except zmq.ZMQError as error:
            channel.close()
            raise Unavailable(f"the channel to the metadata server failed: {error}") from error
        except BaseException:
            channel.close()
            raise
        self._give(channel)
        return decode_reply(body)

    def tell(self, request: Request, rid: int) -> bool:
        """Send a request that is not answered; False if it cannot be sent. Raises Unavailable."""
        frame = encode_request(request, rid=rid, session=self.session, token=self.token, epoch=self.epoch)
        channel = self._take()
        try:
            sent = channel.post(frame)
        except zmq.ZMQError:
            channel.close()
            return False
        self._give(channel)
        return sent

    def new_channel(self) -> Channel:
        """A channel of one's own, not from the pool. Raises Unavailable."""
        try:
            return Channel(self.context, self.endpoint, self.timeout_ms)
        except zmq.ZMQError as error:
            raise Unavailable(f"no channel to the metadata server: {error}") from error

    def end(self) -> None:
        """The server has gone, or we go: requests under way fail soon, and no channel is kept."""
        self.ended = True
        while self._idle:
            try:
                self._idle.pop().close()
            except IndexError:  # another thread took the last one
                return

    def _take(self) -> Channel:
        try:
            return self._idle.pop()
        except IndexError:
            return self.new_channel()

    def _give(self, channel: Channel) -> None:
        if len(self._idle) >= CHANNELS_IDLE_MAX:
            channel.close()
            return
        self._idle.append(channel)
        if self.ended:  # asked last: it may end while we are here, and then nobody else closes this one
            self.end()
