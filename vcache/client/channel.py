"""Requests to the metadata server: ZeroMQ DEALER channels, each used by one thread at a time.

An answer is recognised by its rid: late ones, of requests that were given up, are passed over. A request
without an answer is sent again with the same rid within its deadline; the server keeps its replies, so it is
carried out once.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import msgspec
import zmq

from vcache.errors import Unavailable
from vcache.limits import CHANNELS_IDLE_MAX, FRAME_BYTES_MAX, REQUEST_SENDS_MAX, REQUEST_SLICE_MS
from vcache.protocol import Reply, Request, decode_answer, decode_reply, encode_request
from vcache.table import TableReader


class Channel:
    """One DEALER socket. After an exception it is not used again."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, timeout_ms: int) -> None:
        self._slice_ms = self._patience_ms = min(REQUEST_SLICE_MS, timeout_ms)
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

    def receive(self, within_ms: int) -> bytes | None:
        """The next message; None if there is none in time."""
        if within_ms != self._patience_ms:
            self.socket.rcvtimeo = self._patience_ms = within_ms
        try:
            return self.socket.recv()
        except zmq.Again:
            return None


class Asked:
    """A request whose answer may be waited for in several goes. Used by one thread at a time.

    It was sent, or will be while it is waited for: a new channel takes a moment to connect. Whoever does not
    wait for the answer, nor for an exception, gives up.
    """

    def __init__(self, connection: Connection, channel: Channel, frame: bytes, rid: int) -> None:
        self._connection = connection
        self._channel = channel
        self._frame = frame
        self._rid = rid
        self._slice_ms = min(REQUEST_SLICE_MS, connection.timeout_ms)
        self._again_s = connection.timeout_ms / 1e3 / REQUEST_SENDS_MAX
        self._deadline_s = time.monotonic() + connection.timeout_ms / 1e3
        self._send_at_s = 0.0
        try:
            self._send()
        except BaseException:
            channel.close()
            raise

    def reply(self, within_s: float = math.inf) -> Reply | None:
        """The answer; None if it has not come after `within_s`.

        Raises Unavailable after the request's own timeout, or soon after the connection has ended;
        RemoteProtocolError. After an exception there is no answer any more.
        """
        try:
            body = self._body(time.monotonic() + within_s)
        except zmq.ZMQError as error:
            self.give_up()
            raise Unavailable(f"the channel to the metadata server failed: {error}") from error
        except BaseException:
            self.give_up()
            raise
        if body is None:
            return None
        self._connection.give(self._channel)
        return decode_reply(body)

    def give_up(self) -> None:
        """Wait for no answer any more."""
        self._channel.close()

    def _body(self, until_s: float) -> msgspec.Raw | None:
        """Wait in slices, looking before each whether it still makes sense, and send again now and then."""
        while True:
            now_s = time.monotonic()
            if self._connection.ended:
                raise Unavailable("the connection to the metadata server was lost")
            left_s = min(self._deadline_s, until_s) - now_s
            wait_ms = max(0, min(self._slice_ms, math.ceil(left_s * 1e3)))
            if left_s > 0 and now_s >= self._send_at_s and not self._send():
                self._channel.socket.poll(wait_ms, zmq.POLLOUT)
                continue
            message = self._channel.receive(wait_ms)  # also when time is up: it may have come long ago
            if message is not None:
                answer = decode_answer(message)
                if answer.rid == self._rid:
                    return answer.body
            elif now_s >= self._deadline_s:
                timeout_ms = self._connection.timeout_ms
                raise Unavailable(f"the metadata server did not answer within {timeout_ms} ms")
            elif left_s <= 0:
                return None

    def _send(self) -> bool:
        """False while the channel takes nothing: a new one takes a moment to connect."""
        try:
            self._channel.socket.send(self._frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        self._send_at_s = time.monotonic() + self._again_s
        return True


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

    def begin(self, request: Request, rid: int) -> Asked:
        """Make a request. Raises Unavailable."""
        frame = encode_request(request, rid=rid, session=self.session, token=self.token, epoch=self.epoch)
        channel = self._take()
        try:
            return Asked(self, channel, frame, rid)
        except zmq.ZMQError as error:
            raise Unavailable(f"the channel to the metadata server failed: {error}") from error

    def tell(self, request: Request, rid: int) -> bool:
        """Send a request that is not answered; False if it cannot be sent. Raises Unavailable."""
        frame = encode_request(request, rid=rid, session=self.session, token=self.token, epoch=self.epoch)
        channel = self._take()
        try:
            sent = channel.post(frame)
        except zmq.ZMQError:
            channel.close()
            return False
        self.give(channel)
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

    def give(self, channel: Channel) -> None:
        """Keep a channel for the next request."""
        if len(self._idle) >= CHANNELS_IDLE_MAX:
            channel.close()
            return
        self._idle.append(channel)
        if self.ended:  # asked last: it may end while we are here, and then nobody else closes this one
            self.end()
