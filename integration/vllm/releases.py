"""Giving pins back a little later, all of a while at once: whoever has just loaded has an answer on its way,
which would wait behind us on a machine with few processors.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

from integration.vllm.pools import started
from vcache.client import Client, Grant
from vcache.errors import LocalStateError

_log = logging.getLogger("vcache.integration.vllm")

_LATER_S = 0.02
"""A few times what an answer takes from the engine to its client; of 10 GB/s that are loaded it keeps 200 MB
pinned for longer.
"""


class Releases:
    """Grants to be released. Thread-safe, never fails and never waits for the server."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._guard = threading.Lock()
        self._grants: list[Grant] = []
        self._is_coming = False
        self._closed = threading.Event()
        self._thread = started(ThreadPoolExecutor(1, "vcache-release"), 1)

    def later(self, grants: list[Grant]) -> None:
        """Release these soon."""
        with self._guard:
            self._grants += grants
            if self._is_coming or not grants:
                return
            try:
                self._thread.submit(self._release)
                self._is_coming = True  # and only then: an interrupt may come at any time
            except RuntimeError:
                _log.debug("closed: pins are left to the end of the session")

    def close(self) -> None:
        """Release what is left, now."""
        self._closed.set()
        self._thread.shutdown(wait=True)
        self._release()

    def _release(self) -> None:
        self._closed.wait(_LATER_S)
        with self._guard:
            grants, self._grants, self._is_coming = self._grants, [], False
        for grant in grants:
            try:
                self._client.release(grant)
            except LocalStateError as error:
                _log.debug("release: %s", error)
            except Exception:  # of ours: the others are released
                _log.exception("pins were left to the end of the session")
