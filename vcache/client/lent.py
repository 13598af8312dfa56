"""The segment that this process lends to the pool: made when there is a session, lent, renewed after a cold
start.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from vcache.client.segments import Segments
from vcache.client.wire import Wire
from vcache.errors import VCacheError
from vcache.limits import CLOSE_WAIT_S
from vcache.protocol import Attach, Attached, Detach, Detached, Refused
from vcache.segment import DATA_OFFSET, Segment

_log = logging.getLogger(__name__)

_FIRST_SEQ = 1 << 32
"""Sequence numbers below are segments' numbers: those of Open."""

_RETRY_S = 5.0


class Lent:
    """Our own segment. Used by the session's thread; `number` may be read by any.

    new: makes the segment, in a thread of its own, for that can take long; None: this process lends nothing.
    wake: called when it is made. rank: of the segment. settled: whether it is decided what there is to lend.
    """

    def __init__(
        self,
        new: Callable[[], Segment] | None,
        segments: Segments,
        wake: Callable[[], None],
        rank: int = 0,
    ) -> None:
        self._new = new
        self._rank = rank
        self._segments = segments
        self._wake = wake
        self._making: Future[Segment] | None = None
        self._segment: Segment | None = None
        self._kept: list[Segment] = []
        self._seq = _FIRST_SEQ
        self._asked = 0
        self._retry_at_s = 0.0
        self.number = 0
        self.settled = new is None
        self.detached = True

    def renew(self) -> None:
        """The session was not resumed: writers of the old memory may be asleep, so the next loan needs other
        memory.
        """
        if self._segment is not None:
            if self._segment.importers_first:
                # Nobody can tell when its importers let go of it: it was another server that knew them, and
                # to the one of now its number means nothing. So it is freed by our exit.
                self._kept.append(self._segment)
            else:
                self._segment.close()
            self._segment = None
        self.number = 0
        self.settled = self._new is None

    def attach(self, wire: Wire) -> None:
        """Lend the segment over this connection; if there is none, begin to make it."""
        if self._new is None:
            return
        if self._segment is None:
            self._begin(self._new)
            return
        own = self._segment
        descriptor, fd = own.descriptor()
        self._seq += 1
        self._asked = self._seq
        wire.post(
            Attach(
                self._seq,
                descriptor,
                own.segment_id,
                own.incarnation,
                own.device,
                own.size,
                DATA_OFFSET,
                self._rank,
                -1 if own.numa is None else own.numa,
            ),
            () if fd is None else (fd,),
        )
        self.detached = False

    def _begin(self, new: Callable[[], Segment]) -> None:
        if self._making is None:
            making: Future[Segment] = Future()
            self._making = making
            threading.Thread(
                target=self._make, args=(new, making), name="vcache-new-segment", daemon=True
            ).start()

    def _make(self, new: Callable[[], Segment], making: Future[Segment]) -> None:
        try:
            making.set_result(new())
        except Exception as error:  # the caller's function: whatever it raises must not end the session
            making.set_exception(error)
        self._wake()

    def turn(self, wire: Wire, now_s: float) -> None:
        """Lend what has been made; after a failure, which is logged, try again: old memory may be free by
        then.
        """
        if self._making is not None and self._making.done():
            making, self._making = self._making, None
            error = making.exception()
            if error is None:
                self._segment = making.result()
                self.attach(wire)
            else:
                self._failed(error, now_s)
        elif self._new is not None and self._segment is None and now_s >= self._retry_at_s:
            self._begin(self._new)

    def _failed(self, error: BaseException, now_s: float) -> None:
        if not self.settled:
            ours = isinstance(error, VCacheError)
            _log.error("this process lends no segment: %s", error, exc_info=None if ours else error)
        self.settled = True
        self._retry_at_s = now_s + _RETRY_S

    def attached(self, message: Attached) -> None:
        """The server lent our segment to the pool under a number."""
        if message.seq == self._asked and self._segment is not None:
            self.number = message.segment
            self.settled = True
            self._segments.lend(message.segment, self._segment)

    def refused(self, message: Refused) -> bool:
        """The server refused one of our messages; whether it was one of these here."""
        if message.seq != self._asked:
            return False
        _log.error("the metadata server does not take our segment: %s (%s)", message.message, message.code)
        self.settled = self.detached = True
        return True

    def detach(self, wire: Wire) -> None:
        """Take the segment back; `detached` says when no importer maps it any more."""
        self._new = None
        if self.number and not self.detached:
            self._segments.withdraw(self.number)
            self._seq += 1
            self._asked = self._seq
            wire.post(Detach(self._seq, self.number))

    def on_detached(self, message: Detached) -> None:
        """No importer maps it any more."""
        if message.segment == self.number:
            self.detached = True

    def close(self) -> None:
        """Free the memory; leave it to our exit if importers, who may have it still, must let go first."""
        if self._making is not None:
            self._making.add_done_callback(_close_unused)
        if self._segment is None:
            return
        if self.detached or not self._segment.importers_first:
            self._segment.close(wait_s=CLOSE_WAIT_S)
        self.number = 0


def _close_unused(made: Future[Segment]) -> None:
    if made.exception() is None:
        made.result().close()
