"""Wakes the server's loop, which waits in the ROUTER socket alone, when something else wants it.

Waiting in one ZeroMQ socket is what a bare echo does. Polling it together with plain descriptors would cost
every request several system calls. So a thread watches the descriptors and rings by a message on an inproc
connection.
"""

from __future__ import annotations

import logging
import select
import threading
from collections.abc import Sequence
from typing import Final

import zmq

log = logging.getLogger(__name__)

SENDER: Final = b"doorbell"
"""Routing id of its messages. A client that takes it makes the server look around once more, nothing else."""
_ENDPOINT: Final = "inproc://doorbell"


class Doorbell:
    """Rings (a message from SENDER) when one of `fds` is readable, and not again before `answered`."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], router: zmq.Socket[bytes], fds: Sequence[int]
    ) -> None:
        router.bind(_ENDPOINT)
        self._bell = context.socket(zmq.DEALER)
        self._bell.setsockopt(zmq.ROUTING_ID, SENDER)
        self._bell.setsockopt(zmq.LINGER, 0)
        self._bell.connect(_ENDPOINT)
        self._poll = select.poll()
        for fd in fds:
            self._poll.register(fd, select.POLLIN)
        self._answered = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vcache-doorbell", daemon=True)
        self._thread.start()

    def answered(self) -> None:
        """What rang was looked after: ring again when there is something new."""
        self._answered.set()

    def close(self) -> None:
        """End the thread; one of the descriptors must be readable, or become so."""
        self._ended.set()
        self._answered.set()
        self._thread.join()
        self._bell.close()

    def _watch(self) -> None:
        while not self._ended.is_set():
            self._poll.poll()
            self._answered.clear()
            if self._ended.is_set():
                return
            self._bell.send(b"")
            self._answered.wait()
