"""Copying chunks between segments because the server says so: down before they are evicted, up when used."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from vcache.client import Client, Move
from vcache.errors import LocalStateError, SegmentError, ServerError, Unavailable
from vcache.limits import OFFERS_PER_REQUEST_MAX
from vcache.logs import Line
from vcache.protocol import Extents
from vcache.segment import SegmentMemory

if TYPE_CHECKING:
    from vcache.engine.lanes import Lanes

_log = logging.getLogger(__name__)


class Courier(ABC):
    """A thread that asks for offers of one kind and carries them out; it ends with the client."""

    def __init__(self, client: Client, *, below: bool) -> None:
        self._client = client
        self._below = below
        name = "vcache-write-back" if below else "vcache-mover"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @abstractmethod
    def _carry_out(self, move: Move) -> None:
        """Begin with a move, which has to be ended by `Client.moved`, sooner or later."""

    def _room(self) -> int:
        """How many moves may be taken now; waits until there is at least one, 0 ends the thread."""
        return OFFERS_PER_REQUEST_MAX

    def _prepare(self) -> None:  # noqa: B027  not every courier has to
        """What has to be done before the first move can be carried out at once."""

    def _run(self) -> None:
        seen = -1
        try:
            self._prepare()
            while True:
                seen = self._client.wait_offers(seen)
                try:
                    while (room := self._room()) and (
                        moves := self._client.offers(below=self._below, limit=room)
                    ):
                        for move in moves:
                            self._carry_out(move)
                    if not room:
                        self._client.offers(below=self._below, limit=0)
                        return
                except (Unavailable, ServerError) as error:  # a new server rings the bell
                    _log.debug(Line("no offers now", reason=str(error)))
        except LocalStateError as error:
            _log.debug(Line("copying for the pool ended", reason=str(error)))
        except Exception:
            _log.exception("copying for the pool failed; this process copies nothing any more")


class SegmentMover(Courier):
    """Copies chunks from and to the segment that this process lends, to other segments of the machine."""

    def __init__(self, client: Client, device: str) -> None:
        """device: of that segment."""
        self._on_gpu = device.startswith("cuda")
        self._lanes: Lanes | None = None
        super().__init__(client, below=False)

    def _prepare(self) -> None:
        if self._on_gpu:  # torch takes seconds to import, and a holder of host memory does without it
            from vcache.engine.lanes import Lanes

            self._lanes = Lanes()

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
                source = self._borrowed(move, move.source.extents, borrows)
                target = self._borrowed(move, move.target, borrows)
                if source is None or target is None:
                    return False
                places = int(move.source.extents["offset"][0]), int(move.target["offset"][0])
                self._copy_bytes(source, target, places, length)
            return self._client.intact(move.source)
        except LocalStateError:
            raise
        except Exception as error:  # of a device, or an extent that cannot be: the chunk stays where it is
            _log.warning(Line("a chunk could not be copied", error=repr(error)))
            return False

    def _copy_bytes(
        self, source: SegmentMemory, target: SegmentMemory, places: tuple[int, int], length: int
    ) -> None:
        """When it returns, or raises, the copy is over."""
        if self._lanes is None:
            read, written = source.host_view(places[0], length), target.host_view(places[1], length)
            if read is None or written is None:
                raise SegmentError("a holder of host memory cannot copy from or to a GPU")
            np.copyto(np.frombuffer(written, np.uint8), np.frombuffer(read, np.uint8))  # without the GIL
            return
        from vcache.engine.lanes import PAST

        tensors = source.view(places[0], length), target.view(places[1], length)
        device = next((each.device for each in tensors if each.device.type == "cuda"), tensors[0].device)
        copy = self._lanes.on(device).run(lambda: tensors[1].copy_(tensors[0], non_blocking=True), PAST)
        copy.wait()

    def _borrowed(self, move: Move, extents: Extents, borrows: ExitStack) -> SegmentMemory | None:
        """The segment of an extent, kept where it is; None where it is out of reach."""
        segment = self._client.segment(int(extents["segment"][0]), move.source.lineage)
        borrow = None if segment is None else segment.borrow()
        if segment is None or borrow is None:
            return None
        borrows.enter_context(borrow)
        return segment
