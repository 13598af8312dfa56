"""Request frames in, reply frames out: who may ask, what was asked before, and what an error looks like. No
sockets.

A frame that cannot be answered as asked costs its sender an error reply and nobody else anything.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from metadata_server.directory import Directory
from metadata_server.errors import Refusal
from vcache import limits, protocol
from vcache.errors import RemoteProtocolError
from vcache.logs import Line
from vcache.protocol import ErrorCode

log = logging.getLogger(__name__)

_GRANTING = (protocol.Reserve, protocol.Offers)
_REPLAYED = (
    *_GRANTING,
    protocol.Commit,
    protocol.Acquire,
    protocol.Moved,
    protocol.Remove,
    protocol.Clear,
)
_BY_RIGHT_OF_ID = (*_REPLAYED, protocol.Abort)


@dataclass(eq=False)
class Replays:
    """A session's last answers, for requests that are sent again because the answer was lost."""

    frames: OrderedDict[int, bytes] = field(default_factory=OrderedDict)
    nbytes: int = 0

    def keep(self, rid: int, frame: bytes) -> None:
        """Remember the answer to a request; the oldest ones go when there are too many."""
        self.frames[rid] = frame
        self.nbytes += len(frame)
        while (
            len(self.frames) > limits.REPLAYS_PER_SESSION or self.nbytes > limits.REPLAY_BYTES_PER_SESSION_MAX
        ):
            self.nbytes -= len(self.frames.popitem(last=False)[1])


@dataclass(eq=False)
class Credentials:
    """What a session's frames must carry, and its replays."""

    token: bytes
    replays: Replays = field(default_factory=Replays)


class Requests:
    """Answers request frames on behalf of one directory.

    statistics: builds the reply to `Stats`. shutdown: called for `Shutdown`. rebuild: called after an error
    of our own, returns the directory to go on with, read anew from the table. still_ours: whether the table
    is still this server's to give room from.
    """

    def __init__(
        self,
        directory: Directory,
        epoch: int,
        *,
        statistics: Callable[[], protocol.Statistics],
        shutdown: Callable[[], None],
        rebuild: Callable[[], Directory],
        still_ours: Callable[[], bool],
    ) -> None:
        self.directory = directory
        self.epoch = epoch
        self.sessions: dict[int, Credentials] = {}
        self.draining = False
        self.usurped = False
        self.answered = 0
        self.refused = 0
        self._statistics = statistics
        self._shutdown = shutdown
        self._rebuild = rebuild
        self._still_ours = still_ours

    def answer(self, frames: list[bytes], now_ns: int) -> bytes | None:
        """The reply to one message (the frames behind the sender's identity), None if it wants none."""
        if len(frames) != 1:
            return self._error(0, ErrorCode.MALFORMED, f"got {len(frames)} frames, wanted 1")
        if len(frames[0]) > limits.FRAME_BYTES_MAX:
            wanted = f"wanted at most {limits.FRAME_BYTES_MAX}"
            return self._error(0, ErrorCode.OVERSIZED, f"got a frame of {len(frames[0])} bytes, {wanted}")
        try:
            envelope = protocol.decode_envelope(frames[0])
        except RemoteProtocolError as error:
            return self._error(0, ErrorCode.MALFORMED, str(error))
        try:
            return self._answer(envelope, now_ns)
        except Refusal as refusal:
            return self._error(envelope.rid, refusal.code, str(refusal))
        except RemoteProtocolError as error:
            return self._error(envelope.rid, ErrorCode.MALFORMED, str(error))
        except Exception as error:
            log.exception("a request failed by our own fault: the directory is read anew from the table")
            self.directory = self._rebuild()
            # All sessions begin anew, so that each declares what it holds before it asks for anything else.
            self.epoch = secrets.randbits(63) | 1
            return self._error(envelope.rid, ErrorCode.INTERNAL, f"{type(error).__name__}: {error}")

    def _answer(self, envelope: protocol.Envelope, now_ns: int) -> bytes | None:
        credentials = self._verify(envelope)
        request = protocol.decode_request(envelope.body)
        replayed = isinstance(request, _REPLAYED)
        if replayed and envelope.rid in credentials.replays.frames:
            return credentials.replays.frames[envelope.rid]
        if isinstance(request, _BY_RIGHT_OF_ID):
            settled = self.directory.rights.of(envelope.session).settled
            if envelope.rid <= settled:
                raise Refusal(
                    ErrorCode.STALE, f"request {envelope.rid} was settled: the sender declared {settled}"
                )
            if isinstance(request, _GRANTING):
                self._check_may_grant()
        reply = self._handle(envelope, request, now_ns)
        self.answered += 1
        if isinstance(request, protocol.Release):
            return None
        frame = protocol.encode_answer(reply, rid=envelope.rid)
        if replayed:
            credentials.replays.keep(envelope.rid, frame)
        return frame

    def _verify(self, envelope: protocol.Envelope) -> Credentials:
        if envelope.version != protocol.PROTOCOL_VERSION:
            ours = protocol.PROTOCOL_VERSION
            raise Refusal(
                ErrorCode.VERSION, f"got protocol version {envelope.version}, this server speaks {ours}"
            )
        if self.usurped:
            raise Refusal(ErrorCode.GONE, "this server lost its runtime directory to another one")
        if envelope.epoch != self.epoch:
            raise Refusal(ErrorCode.EPOCH, "the request is for an earlier server: begin a new session")
        credentials = self.sessions.get(envelope.session)
        if credentials is None or not hmac.compare_digest(credentials.token, envelope.token):
            raise Refusal(ErrorCode.TOKEN, "unknown session or wrong token: begin a new session")
        return credentials

    def _check_may_grant(self) -> None:
        """Room is what two servers must never give away from one table: nothing else is worth asking each
        time.
        """
        if self.draining:
            raise Refusal(ErrorCode.DRAINING, "the server is ending")
        if not self._still_ours():
            self.usurped = True
            raise Refusal(ErrorCode.GONE, "this server lost its runtime directory to another one")

    def _handle(self, envelope: protocol.Envelope, request: protocol.Request, now_ns: int) -> protocol.Reply:
        if isinstance(request, protocol.Ping):
            return protocol.Pong(os.getpid())
        if isinstance(request, protocol.Stats):
            return self._statistics()
        if isinstance(request, protocol.Shutdown):
            self._shutdown()
            return protocol.Done()
        if isinstance(request, protocol.Check):
            try:
                return self.directory.handle(envelope.session, envelope.rid, request, now_ns)
            except AssertionError as error:
                log.error(Line("the directory contradicts itself", error=str(error)))
                raise Refusal(ErrorCode.INTERNAL, f"check: {error}") from error
        return self.directory.handle(envelope.session, envelope.rid, request, now_ns)

    def _error(self, rid: int, code: str, message: str) -> bytes:
        self.refused += 1
        log.debug(Line("refused", code=code, message=message))
        return protocol.encode_answer(protocol.Error(code, message), rid=rid)
