"""Chunks that this process reads under a pin, and may go on reading until it lets go of them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from torch import Tensor

from vcache.client import Grant
from vcache.engine.pool import Pool
from vcache.errors import LocalStateError
from vcache.limits import KEYS_PER_REQUEST_MAX
from vcache.table import Standing


class _Pinned:
    """What one request pinned; it ends as one, when the last chunk of it is used no more."""

    def __init__(self, grant: Grant, borrows: ExitStack) -> None:
        self.grant = grant
        self.borrows = borrows
        self.left = 0


class Hold:
    """A chunk that stays where it is, in its segment and in our address space, until `Holds.drop`.

    chunk: its bytes (uint8, 1-D), read-only by agreement.
    """

    __slots__ = ("at", "chunk", "key", "pinned", "uses")

    def __init__(self, key: bytes, chunk: Tensor, pinned: _Pinned, at: int) -> None:
        self.key = key
        self.chunk = chunk
        self.pinned = pinned
        self.at = at
        self.uses = 1

    @property
    def is_there(self) -> bool:
        """Whether the pool has it still: nobody has removed it since, in whatever process."""
        return self.pinned.grant.standing(self.at) is Standing.THERE


class Holds:
    """All holds of one process. A chunk that is held, and in the pool, is held once more without a request.

    Thread-safe; raises only EngineClosed and ForkedProcess, and `drop` nothing at all.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._guard = threading.Lock()
        self._by_key: dict[bytes, Hold] = {}
        self._held = 0

    def __len__(self) -> int:
        return self._held

    def take(self, keys: Sequence[bytes]) -> list[Hold | None]:
        """Hold each chunk that is in the pool, as often as it is named; None where there is none."""
        with self._guard:
            held = {
                key: hold
                for key in dict.fromkeys(keys)
                if (hold := self._by_key.get(key)) is not None and hold.is_there
            }
            for key in keys:
                if key in held:
                    held[key].uses += 1
        missing = [key for key in dict.fromkeys(keys) if key not in held]
        new: dict[bytes, Hold] = {}
        for begin in range(0, len(missing), KEYS_PER_REQUEST_MAX):
            new.update(self._pin(missing[begin : begin + KEYS_PER_REQUEST_MAX]))
        if new:
            with self._guard:
                for key in keys:
                    if key in new:
                        new[key].uses += 1
                for hold in new.values():
                    hold.uses -= 1  # the one that it was made with
                    known = self._by_key.get(hold.key)
                    if known is None or not known.is_there:
                        self._by_key[hold.key] = hold
        return [held.get(key) or new.get(key) for key in keys]

    def again(self, hold: Hold) -> Hold:
        """Hold a chunk that is held once more."""
        with self._guard:
            assert hold.uses > 0, "a hold that was dropped is taken again"
            hold.uses += 1
        return hold

    def drop(self, hold: Hold) -> None:
        """Let go of it, once; with the last use its memory may go."""
        with self._guard:
            assert hold.uses > 0, "a hold was dropped more often than taken"
            hold.uses -= 1
            if hold.uses:
                return
            if self._by_key.get(hold.key) is hold:
                del self._by_key[hold.key]
            del hold.chunk
            self._held -= 1
            hold.pinned.left -= 1
            ended = hold.pinned.left == 0
        if ended:
            self._end(hold.pinned)

    def drop_all(self, holds: Iterable[Hold | None]) -> None:
        """Let go of each, once."""
        for hold in holds:
            if hold is not None:
                self.drop(hold)

    def _pin(self, keys: list[bytes]) -> dict[bytes, Hold]:
        grant = self._pool.acquire(keys, pin=True, prefix=False)
        if grant is None or not len(grant.extents):
            return {}
        flags = grant.flags or []
        found = [key for key, there in zip(keys, flags, strict=True) if there]
        pinned = _Pinned(grant, ExitStack())
        holds: dict[bytes, Hold] = {}
        try:
            views = pinned.borrows.enter_context(
                self._pool.borrowed(grant.extents, grant.extents["length"].tolist(), grant.lineage)
            )
            # Intact and borrowed now: then pin and memory stay as they are until they are given back.
            for at, (key, view) in enumerate(zip(found, views, strict=True)):
                if view is not None and self._pool.intact(grant, at, at + 1):
                    holds[key] = Hold(key, view, pinned, at)
            del view
            views.clear()
        finally:
            pinned.left = len(holds)
            if not holds:
                self._end(pinned)
        with self._guard:
            self._held += len(holds)
        return holds

    def _end(self, pinned: _Pinned) -> None:
        pinned.borrows.close()
        try:
            self._pool.release(pinned.grant)
        except LocalStateError:
            return  # the session has ended, and its pins with it
