"""`Client`: what an engine asks of the pool. Every call is bounded in time; without a server it fails in
microseconds.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence

from vcache.client.moving import Moving
from vcache.client.reading import Reading
from vcache.client.requests import Requests, packed_keys
from vcache.client.segments import Memory
from vcache.client.session import Session
from vcache.client.writing import Writing
from vcache.config import Config
from vcache.errors import ArgumentError, EngineClosed, ForkedProcess
from vcache.limits import LABEL_BYTES_MAX, LIST_PAGE_MAX, NAMESPACE_BYTES
from vcache.protocol import (
    Check,
    Clear,
    Describe,
    Done,
    List,
    Listed,
    Ping,
    Pong,
    Remove,
    Shutdown,
    Statistics,
    Stats,
    Touch,
)
from vcache.runtime import RuntimeDir
from vcache.segment import Segment


class Client(Reading, Writing, Moving):
    """One process' access to the pool. Thread-safe.

    Requests raise `Unavailable` (at once while there is no server, after `client.request_timeout_ms` at the
    latest), `ServerError` and `ArgumentError`; after `close` EngineClosed, in a child after fork()
    ForkedProcess. What was granted and lost on the way comes back by itself: the session declares what it
    owns.
    """

    def __init__(
        self,
        config: Config,
        *,
        name: str,
        new_segment: Callable[[], Segment] | None = None,
        rank: int = 0,
    ) -> None:
        """Begin a session in the background; an absent server is no error. Raises ConfigError for the runtime
        directory.

        new_segment: makes the segment that this process lends; called in the background once there is a
        session, and again after a cold start of the server. The client closes what it made. rank: of that
        segment.
        """
        if not isinstance(name, str) or not 0 < len(name.encode(errors="replace")) <= LABEL_BYTES_MAX:
            raise ArgumentError("name", repr(name)[:80], f"a str of 1 to {LABEL_BYTES_MAX} bytes")
        runtime = RuntimeDir.resolve(config.runtime_dir, group=config.server.group)
        self._session = session = Session(config, name, runtime, new_segment, rank)
        self._breaker = session.breaker
        self._ledger = session.ledger
        self._segments = session.segments
        self._requests = Requests(session.breaker, session.ledger, session.counters)
        self._connect_timeout_s = config.client.connect_timeout_ms / 1e3
        session.start()
        _clients.add(self)

    # -- state

    @property
    def connected(self) -> bool:
        """Whether requests go through now."""
        return self._breaker.connection is not None

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until requests go through and the own segment, if any, is lent or known to be impossible."""
        self._breaker.check_usable()
        return self._breaker.wait(timeout_s)

    @property
    def epoch(self) -> int:
        """Of the server that requests go to now: another one after each of its starts; 0 if there is none."""
        connection = self._breaker.connection
        return 0 if connection is None else connection.epoch

    @property
    def own_segment(self) -> int:
        """The number of the segment that this process lends now; 0 if none."""
        return self._session.lent.number

    @property
    def counters(self) -> dict[str, int]:
        """What went wrong so far, by name, and what the ledger holds."""
        return {**self._session.counters, **self._ledger.counts()}

    def close(self) -> None:
        """End the session; waits, bounded, for running copies and for importers of the own segment. May be
        called again.
        """
        if not self._breaker.is_shut:
            self._breaker.shut(EngineClosed("this client was closed"))
            self._session.stop()
            _clients.discard(self)

    def wait_offers(self, seen: int) -> int:
        """Wait until there is reason to ask for offers that was not when this returned `seen`; -1: at once.

        A notice of the server is one, and so is a new server, which offers nothing to who has not asked it.
        Raises EngineClosed, ForkedProcess.
        """
        seen = self._session.offering.wait(seen)
        self._breaker.check_usable()
        return seen

    def segment(self, number: int, lineage: int) -> Memory | None:
        """The memory of a segment, mapped on first use; None if it cannot be had: a miss.

        lineage: of the grant or reservation that named the number; in another one it would be other memory.
        """
        self._breaker.check_usable()
        return self._segments.get(number, lineage, self._connect_timeout_s)

    def map_segments(self) -> int:
        """Map all segments of the pool now, and not at their first use, which then takes long; how many are.

        Raises Unavailable, ServerError.
        """
        lineage = self._requests.connection().lineage
        rows = self.stats().segments
        return sum(self.segment(row.segment, lineage) is not None for row in rows if row.held)

    # -- for people and programs

    def ping(self) -> float:
        """Seconds until the server answered."""
        started_s = time.perf_counter()
        self._requests.ask(Ping(), Pong)
        return time.perf_counter() - started_s

    def touch(self, keys: Sequence[bytes]) -> int:
        """Count keys as used now, the first as the most recent; how many were there."""
        return self._requests.ask(Touch(packed_keys(keys)), Done).count

    def remove(self, keys: Sequence[bytes]) -> int:
        """Forget chunks; how many were there."""
        return self._requests.ask(Remove(packed_keys(keys)), Done).count

    def clear(self, namespace: bytes = b"") -> int:
        """Forget all chunks, or those of one namespace; how many there were."""
        if len(namespace) not in (0, NAMESPACE_BYTES):
            raise ArgumentError(
                "namespace", f"{len(namespace)} bytes", f"{NAMESPACE_BYTES} bytes, or none for all"
            )
        return self._requests.ask(Clear(namespace), Done).count

    def list(self, cursor: int = 0, limit: int = 100) -> Listed:
        """A page of the directory, from the cursor that the page before gave (0: from the start)."""
        if not 1 <= limit <= LIST_PAGE_MAX:
            raise ArgumentError("limit", limit, f"1 to {LIST_PAGE_MAX}")
        return self._requests.ask(List(cursor, limit), Listed)

    def stats(self) -> Statistics:
        """The server's counters, segments and sessions."""
        return self._requests.ask(Stats(), Statistics)

    def check(self) -> None:
        """Have the server prove that nothing overlaps or leaks. Raises ServerError with what is wrong."""
        self._requests.ask(Check(), Done)

    def describe(self, digest: bytes, label: str) -> None:
        """Give a layout fingerprint or a namespace a name for people to read."""
        if len(label.encode()) > LABEL_BYTES_MAX:
            raise ArgumentError("label", f"{len(label.encode())} bytes", f"at most {LABEL_BYTES_MAX} bytes")
        self._requests.ask(Describe(digest, label), Done)

    def shutdown(self) -> None:
        """End the server, as SIGTERM does."""
        self._requests.ask(Shutdown(), Done)

    def _forget_in_child(self) -> None:
        made_in = os.getppid()
        self._breaker.forked(
            ForkedProcess(f"this client was made before fork(), in process {made_in}: make a new one")
        )
        self._session.forget_in_child()
        _of_parents.append(self)


_clients: weakref.WeakSet[Client] = weakref.WeakSet()
_of_parents: list[Client] = []
"""Clients of this process' parents: never collected here, since their sockets and threads belong to another
process.
"""


def _forget_clients_in_child() -> None:
    for client in list(_clients):
        client._forget_in_child()
    _clients.clear()


os.register_at_fork(after_in_child=_forget_clients_in_child)
