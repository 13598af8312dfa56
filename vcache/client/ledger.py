"""What this process owns in the pool, and which answers are still to come: state without I/O or clock.

A request's id (rid) is **outstanding** from before it is sent until its answer was booked or it was given up
for good. What an answer grants is booked and its rid settled in one step, so every declaration is true: what
was granted by requests up to `settled` and is not named in it is really owned no more, however late the
declaration arrives.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Final

from vcache.errors import Unavailable
from vcache.protocol import Declare, Right, pack_handles

Handle = tuple[int, int]
"""(index, stamp) of an extent; stamp = tenure << 32 | generation.

A tenure is the time between two sessions that were not resumed. Generations begin anew with another extent
table, so without the tenure a handle from before could be taken for an extent that was granted since.
"""

_NOTHING: Final[tuple[Handle, ...]] = ()


class Ledger:
    """The books of one session. Thread-safe.

    line: number of the connection that requests may be made over now; 0 while there is none. What was begun
    on an earlier one is given up: its answers are not booked any more.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._last = 0
        self._outstanding: dict[int, tuple[Handle, ...]] = {}
        self._reserved: dict[int, int] = {}
        self._pins: dict[int, dict[int, int]] = {}
        self.line = 0
        self._lines = 0

    # -- connections

    def interrupt(self) -> None:
        """The connection is lost: give up all that is outstanding, and let nothing begin on it any more."""
        with self._guard:
            self.line = 0
            for hanging in self._outstanding.values():
                self._forget(hanging)
            self._outstanding.clear()

    def resume(self, *, void: bool) -> int:
        """A new connection is there; returns its line. void: the server has kept nothing of what we owned."""
        with self._guard:
            assert self.line == 0 and not self._outstanding, "resume: the old connection was not interrupted"
            if void:
                self._reserved.clear()
                self._pins.clear()
            self._lines += 1
            self.line = self._lines
            return self.line

    # -- requests

    def begin(self, line: int, hanging: tuple[Handle, ...] = _NOTHING) -> int:
        """A new rid, outstanding from now on; `hanging`: reserved extents whose fate its answer decides.

        Raises Unavailable if `line` is not the connection of now.
        """
        with self._guard:
            if line != self.line:
                raise Unavailable("the connection to the metadata server was lost")
            self._last = rid = self._last + 1
            self._outstanding[rid] = hanging
            return rid

    def finish(self, rid: int) -> None:
        """Settle a request that granted nothing, or give it up for good: then what hangs on it is not ours
        any more.
        """
        with self._guard:
            hanging = self._outstanding.pop(rid, _NOTHING)
            if hanging:
                self._forget(hanging)

    def book_reservation(self, rid: int, granted: Iterable[Handle]) -> bool:
        """Settle a reserve: its extents are ours. False, and nothing booked, if it was given up meanwhile."""
        with self._guard:
            if self._outstanding.pop(rid, None) is None:
                return False
            self._reserved.update(granted)
            return True

    def book_pin(self, rid: int, granted: Iterable[Handle]) -> bool:
        """Settle an acquire that pins. False, and nothing booked, if it was given up meanwhile."""
        with self._guard:
            if self._outstanding.pop(rid, None) is None:
                return False
            pinned = dict(granted)
            if pinned:
                self._pins[rid] = pinned
            return True

    def book_offers(self, rid: int, pinned: Iterable[Handle], reserved: Iterable[Handle]) -> bool:
        """Settle a request for offers: sources are pinned, targets ours. False as for `book_pin`."""
        with self._guard:
            if self._outstanding.pop(rid, None) is None:
                return False
            if held := dict(pinned):
                self._pins[rid] = held
            self._reserved.update(reserved)
            return True

    def book_commit(self, rid: int, ended: Iterable[Handle]) -> bool:
        """Settle a commit: the `ended` extents are not ours any more, the others still are. False if it was
        given up.
        """
        with self._guard:
            if self._outstanding.pop(rid, None) is None:
                return False
            self._forget(ended)
            return True

    # -- giving back

    def drop_reserved(self, handles: Iterable[Handle]) -> list[Handle]:
        """Stop owning reserved extents; returns those that were owned."""
        with self._guard:
            owned = [(index, stamp) for index, stamp in handles if self._reserved.get(index) == stamp]
            for index, _ in owned:
                del self._reserved[index]
            return owned

    def drop_pin(self, rid: int, part: Iterable[Handle] | None = None) -> None:
        """Stop holding a pin, or a part of it. One that is not held is passed over."""
        with self._guard:
            held = self._pins.get(rid)
            if held is None:
                return
            for index, stamp in list(held.items()) if part is None else part:
                if held.get(index) == stamp:
                    del held[index]
            if not held:
                del self._pins[rid]

    # -- telling

    def declaration(self) -> Declare:
        """All that we own, and up to which request that is the whole truth."""
        with self._guard:
            settled = next(iter(self._outstanding), self._last + 1) - 1
            pins = [Right(rid, _packed(held)) for rid, held in self._pins.items()]
            return Declare(settled, _packed(self._reserved), pins)

    def counts(self) -> dict[str, int]:
        """Sizes, for people and tests."""
        with self._guard:
            return {
                "outstanding": len(self._outstanding),
                "reserved": len(self._reserved),
                "pinned": sum(map(len, self._pins.values())),
            }

    def _forget(self, handles: Iterable[Handle]) -> None:
        for index, stamp in handles:
            if self._reserved.get(index) == stamp:
                del self._reserved[index]


def _packed(handles: Mapping[int, int]) -> bytes:
    return pack_handles(list(handles.keys()), [stamp & 0xFFFF_FFFF for stamp in handles.values()])
