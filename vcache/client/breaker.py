"""Whether requests are made at all: open while there is no server that answers, so that a miss costs
microseconds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from vcache.errors import EngineClosed, ForkedProcess, Unavailable

if TYPE_CHECKING:
    from vcache.client.channel import Connection

_log = logging.getLogger(__name__)


class Breaker:
    """A circuit breaker. `connection` is what requests go over, None while it is open; read it without a
    lock.

    It trips at once when the connection is lost and when a request got no answer in time. It is closed again
    only by the session's thread, when the server has answered there.
    """

    def __init__(
        self, name: str, on_trip: Callable[[], None], on_admit: Callable[[], None] = lambda: None
    ) -> None:
        self.connection: Connection | None = None
        self._name = name
        self._on_trip = on_trip
        self._on_admit = on_admit
        self._changed = threading.Condition()
        self._why = "the metadata server was not reached yet"
        self._final: EngineClosed | ForkedProcess | None = None
        self._segment_settled = False

    def refuse(self) -> NoReturn:
        """Raise what stands against requests now."""
        if self._final is not None:
            raise type(self._final)(str(self._final))
        raise Unavailable(self._why)

    def admit(self, connection: Connection) -> None:
        """The server has answered over this connection: let requests through."""
        with self._changed:
            if self._final is not None or self.connection is connection:
                return
            self.connection = connection
            self._changed.notify_all()
        _log.info("%s: connected to the metadata server (process %d)", self._name, connection.server_pid)
        self._on_admit()

    def trip(self, connection: Connection | None, why: str) -> bool:
        """Refuse requests from now on, because of `why`; True, and logged, if they went through until now.

        connection: the one that failed; None: whichever it is now.
        """
        with self._changed:
            if self.connection is None:
                self._why = why
                return False
            if connection is not None and self.connection is not connection:
                return False
            self.connection = None
            self._why = why
        _log.warning("%s: %s; requests are misses until it answers again", self._name, why)
        self._on_trip()
        return True

    def shut(self, final: EngineClosed | ForkedProcess) -> None:
        """Refuse requests for ever."""
        with self._changed:
            self._final = final
            self.connection = None
            self._changed.notify_all()

    def forked(self, final: ForkedProcess) -> None:
        """As `shut`, in a child after fork(): another thread of the parent may have been inside the lock."""
        self._changed = threading.Condition()
        self.shut(final)

    @property
    def is_shut(self) -> bool:
        """Whether it is open for ever."""
        return self._final is not None

    @property
    def is_forked(self) -> bool:
        """Whether this is a child that fork() made."""
        return isinstance(self._final, ForkedProcess)

    def check_usable(self) -> None:
        """Raise EngineClosed or ForkedProcess if it is open for ever."""
        if self._final is not None:
            self.refuse()

    def segment_settled(self, settled: bool) -> None:
        """Whether it is decided what the own segment is (attached, not wanted, impossible)."""
        with self._changed:
            self._segment_settled = settled
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Wait until requests go through and the own segment is settled; whether they do."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._final is not None or (self.connection is not None and self._segment_settled),
                timeout_s,
            )
            return self.connection is not None and self._segment_settled
