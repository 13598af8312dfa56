"""Writing chunks to the lower tiers when the pool is about to evict them."""

from __future__ import annotations

import threading
from contextlib import suppress

from vcache.client import Client, Move
from vcache.engine.moving import Courier
from vcache.engine.tier_queue import Saved, TierQueues
from vcache.errors import LocalStateError, ServerError, Unavailable
from vcache.limits import SAVE_HANG_LOOK_S, SAVES_MAX


class WriteBack(Courier):
    """Has chunks that are about to be evicted written to the lower tiers, SAVES_MAX at once."""

    def __init__(self, client: Client, queues: TierQueues) -> None:
        self._queues = queues
        self._under_way = 0
        self._is_ending = False
        self._changed = threading.Condition()
        super().__init__(client, below=True)

    def close(self) -> None:
        """Take no more; what was taken goes on."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        with suppress(Unavailable, ServerError, LocalStateError):  # then the session's end tells it, too
            self._client.offers(below=True, limit=0)

    def _room(self) -> int:
        while True:
            with self._changed:
                may_go_on = self._changed.wait_for(
                    lambda: self._under_way < SAVES_MAX or self._is_ending, SAVE_HANG_LOOK_S
                )
                if may_go_on:
                    return 0 if self._is_ending else SAVES_MAX - self._under_way
            self._queues.give_up_saving()

    def _carry_out(self, move: Move) -> None:
        with self._changed:
            self._under_way += 1

        def end(saved: Saved) -> None:
            try:
                if not self._client.moved(move, done=bool(saved)):
                    saved.undo()  # it was removed from the pool meanwhile: it must not come back
            finally:
                with self._changed:
                    self._under_way -= 1
                    self._changed.notify_all()

        self._queues.take(move, end)
