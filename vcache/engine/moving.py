"""Copying chunks between segments because the server says so: down before they are evicted, up when used."""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

from vcache.client import Client, Move
from vcache.errors import LocalStateError, RemoteProtocolError, SegmentError, ServerError, Unavailable
from vcache.limits import OFFERS_PER_REQUEST_MAX
from vcache.logs import Line
from vcache.protocol import Extents

if TYPE_CHECKING:
    from torch import Tensor

    from vcache.engine.lanes import Lanes

_log = logging.getLogger(__name__)


class Courier:
    """A thread that asks for offers of one kind and carries them out; it ends with the client.

    A subclass says what `_carry_out` does with a move: it has to end it, by `Client.moved`, sooner or later.
    """

    def __init__(self, client: Client, *, below: bool) -> None:
        self._client = client
        self._below = below
        name = "vcache-write-back" if below else "vcache-mover"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _carry_out(self, move: Move) -> None:
        raise NotImplementedError

    def _room(self) -> int:
        """How many moves may be taken now; waits until there is at least one, 0 ends the thread."""
        return OFFERS_PER_REQUEST_MAX

    def _run(self) -> None:
        seen = -1
        try:
            while True:
                seen = self._client.wait_offers(seen)
                try:
                    while (room := self._room()) and (
                        moves := self._client.offers(below=self._below, limit=room)
                    ):
                        for move in moves:
                            self._carry_out(move)
                    if not room:
                        return
                except (Unavailable, ServerError) as error:  # a new server rings the bell
                    _log.debug(Line("no offers now", reason=str(error)))
        except LocalStateError as error:
            _log.debug(Line("copying for the pool ended", reason=str(error)))
        except Exception:
            _log.exception("copying for the pool failed; this process copies nothing any more")


class SegmentMover(Courier):
    """Copies chunks from and to the segment that this process lends, to other segments of the machine."""

    def __init__(self, client: Client) -> None:
        self._lanes: Lanes | None = None
        super().__init__(client, below=False)

    def _carry_out(self, move: Move) -> None:
        done = False
        try:
            done = self._copy(move)
        finally:
            self._client.moved(move, done=done)

    def _copy(self, move: Move) -> bool:
        """Copy one chunk, to the end; whether the target has it."""
        assert move.target is not None
        length = int(move.source.extents["length"][0])
        try:
            with ExitStack() as borrows:
                source = self._view(move, move.source.extents, length, borrows)
                target = self._view(move, move.target, length, borrows)
                if source is None or target is None:
                    return False
                self._copy_bytes(source, target)
                del source, target
            return self._client.intact(move.source)
        except LocalStateError:
            raise
        except Exception as error:  # of a device: this chunk stays where it is
            _log.warning(Line("a chunk could not be copied", error=repr(error)))
            return False

    def _copy_bytes(self, source: Tensor, target: Tensor) -> None:
        from vcache.engine.lanes import PAST, Lanes  # torch: a holder that never copies does without it

        self._lanes = self._lanes or Lanes()
        device = source.device if source.device.type == "cuda" else target.device
        self._lanes.on(device).run(lambda: target.copy_(source, non_blocking=True), PAST).wait()

    def _view(self, move: Move, extents: Extents, length: int, borrows: ExitStack) -> Tensor | None:
        """The first `length` bytes of an extent; None where it is out of reach."""
        segment = self._client.segment(int(extents["segment"][0]), move.source.lineage)
        borrow = None if segment is None else segment.borrow()
        if segment is None or borrow is None:
            return None
        borrows.enter_context(borrow)
        try:
            return segment.view(int(extents["offset"][0]), length)
        except (RemoteProtocolError, SegmentError) as error:
            _log.warning(Line("an extent is out of reach", error=str(error)))
            return None
