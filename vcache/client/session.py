"""This process' session with the metadata server, kept by one background thread.

It dials, greets, declares, lends our segment, maps and unmaps on notice, and when the connection ends it
begins anew. The moment the connection ends, requests are refused; they are let through again when the server
has answered a declaration.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable

import zmq

from vcache.client.autostart import start_server
from vcache.client.bell import Bell
from vcache.client.breaker import Breaker
from vcache.client.channel import Connection
from vcache.client.control import Control
from vcache.client.ledger import Ledger
from vcache.client.lent import Lent
from vcache.client.segments import Segments
from vcache.client.wire import Received, ServerAbsent, SessionRefused, Wire, close_all
from vcache.config import Config
from vcache.errors import ConfigError, RemoteProtocolError, Unavailable
from vcache.limits import (
    AUTOSTART_PATIENCE_S,
    BYE_WAIT_S,
    CLOSE_WAIT_S,
    RECONNECT_PAUSE_MAX_S,
    RECONNECT_PAUSE_MIN_S,
    VERSION_RETRY_S,
)
from vcache.protocol import (
    PROTOCOL_VERSION,
    Attached,
    Bye,
    Detached,
    ErrorCode,
    FromClient,
    Gone,
    Hello,
    Offering,
    Opened,
    Refused,
    Welcome,
)
from vcache.runtime import OwnerLock, RuntimeDir
from vcache.segment import Segment
from vcache.table import TableReader

_log = logging.getLogger(__name__)


class Session:
    """Everything that the background thread does. `start` and `stop` belong to the client, the rest is the
    thread's.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        runtime: RuntimeDir,
        new_segment: Callable[[], Segment] | None,
        rank: int = 0,
    ) -> None:
        self.number = secrets.randbits(63) | 1
        self.counters: Counter[str] = Counter()
        self.ledger = Ledger()
        self.offering = Bell()
        self.breaker = Breaker(name, self._tripped, self.offering.ring)
        self.segments = Segments(self.post, config.device, lambda: self.breaker.connection is not None)
        self.lent = Lent(new_segment, self.segments, self.wake, rank)
        self._config = config
        self._name = name
        self._runtime = runtime
        self._lock = OwnerLock(runtime.session_lock_path(self.number), mode=runtime.file_mode)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake_guard = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._wire: Wire | None = None
        self._lineage = 0
        self._tenure = 0
        self._pause_s = RECONNECT_PAUSE_MIN_S
        self._logged = ""
        self._absent_since_s = math.inf
        self._stop_at_s: float | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=f"vcache-session-{name}", daemon=True)

    # -- for other threads

    @property
    def lineage(self) -> int:
        """The lineage of the extent table that the session is (or was last) about."""
        return self._lineage

    def start(self) -> None:
        """Begin. Raises ConfigError if the session's lock cannot be made."""
        self._lock.try_acquire()
        self._thread.start()

    def stop(self) -> None:
        """End the session: say so if copies are over, wait for the thread (bounded)."""
        self._stop_at_s = time.monotonic() + CLOSE_WAIT_S
        self.offering.ring()
        self.wake()
        self._thread.join(2 * CLOSE_WAIT_S)
        if self._thread.is_alive():
            _log.warning("%s: the session's thread did not end in time", self._name)

    def wake(self) -> None:
        """Have the thread look around now."""
        with self._wake_guard:  # or it could be closed in between, and be another file by then
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def _tripped(self) -> None:
        self.segments.unanswered()
        self.wake()

    def post(self, message: FromClient) -> bool:
        """Send a message over the connection of now; False if there is none."""
        wire = self._wire
        if wire is None:
            return False
        wire.post(message)
        return True

    def forget_in_child(self) -> None:
        """In a child after fork(): let go of what would hide our parent's death. Its own copies stay
        untouched.
        """
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    # -- the thread

    def _run(self) -> None:
        try:
            while self._stop_at_s is None:
                try:
                    self._one_connection()
                except (Unavailable, RemoteProtocolError, ConfigError) as error:
                    self._failed(error)
                except Exception:
                    _log.exception("%s: the session's thread failed; it begins anew", self._name)
                    self._pause_s = RECONNECT_PAUSE_MAX_S
                if self._stop_at_s is None:
                    self._sleep(self._pause_s * random.uniform(0.5, 1.0))
                    self._pause_s = min(2 * self._pause_s, max(RECONNECT_PAUSE_MAX_S, self._pause_s))
        finally:
            self._clean_up()

    def _one_connection(self) -> None:
        """Dial, greet, and serve until the connection ends or we stop."""
        wire = self._dial()
        try:
            welcome, table = self._greet(wire)
            connection = self._enter(welcome, table)
            self._wire = wire
            try:
                self._serve(wire, connection)
            except (Unavailable, RemoteProtocolError) as error:
                self.counters["connections_lost"] += 1
                if self.breaker.trip(None, str(error)):
                    self._logged = str(error)
                raise
            finally:
                self._leave(connection)
        finally:
            wire.close()

    def _dial(self) -> Wire:
        if not self._lock.still_ours():
            # The runtime directory was made anew: so must the lock be, before we connect.
            RuntimeDir.resolve(str(self._runtime.path), group=self._config.server.group)
            self._lock.release()
            self._lock.try_acquire()
        try:
            return Wire.dial(self._runtime.session_path, self.wake)
        except ServerAbsent:
            if self._config.server.autostart and start_server(self._config, self._runtime):
                self.counters["autostarts"] += 1
                self._pause_s = RECONNECT_PAUSE_MIN_S
            raise

    def _greet(self, wire: Wire) -> tuple[Welcome, TableReader]:
        wire.greet(Hello(PROTOCOL_VERSION, self.number, self._lineage, self._name))
        deadline_s = time.monotonic() + self._config.client.connect_timeout_ms / 1e3
        while (answer := wire.welcomed()) is None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or self._stop_at_s is not None:
                raise Unavailable("the metadata server did not answer the greeting in time")
            self._poll(wire, None, left_s)
        welcome, table_fd = answer
        if welcome.version != PROTOCOL_VERSION:
            os.close(table_fd)
            raise SessionRefused(
                ErrorCode.VERSION, f"it speaks version {welcome.version}, this client {PROTOCOL_VERSION}"
            )
        table = TableReader(table_fd)
        if table.lineage != welcome.lineage:
            raise RemoteProtocolError(
                f"welcome: lineage {welcome.lineage}, but the table's is {table.lineage}"
            )
        return welcome, table

    def _enter(self, welcome: Welcome, table: TableReader) -> Connection:
        """Go on with what we own, or give all of it up, as the server says."""
        resumed = welcome.resumed and welcome.lineage == self._lineage
        if not resumed:
            if self._tenure:
                _log.warning(
                    "%s: the metadata server kept nothing of this session; it starts cold", self._name
                )
                self.counters["cold_starts"] += 1
            self._tenure += 1
            self.lent.renew()
            self.segments.enter(welcome.lineage)
        self._lineage = welcome.lineage
        line = self.ledger.resume(void=not resumed)
        self._pause_s = RECONNECT_PAUSE_MIN_S
        self._logged = ""
        self._absent_since_s = math.inf
        return Connection(
            context=self._context,
            endpoint=self._runtime.rpc_endpoint,
            timeout_ms=self._config.client.request_timeout_ms,
            session=self.number,
            token=welcome.token,
            epoch=welcome.epoch,
            lineage=welcome.lineage,
            line=line,
            tenure=self._tenure,
            table=table,
            server_pid=welcome.pid,
        )

    def _leave(self, connection: Connection) -> None:
        """In this order: nothing begins any more, what is under way is given up, and only then told so."""
        self.breaker.trip(None, "the connection to the metadata server has ended")
        self.ledger.interrupt()
        connection.end()
        self._wire = None
        self.segments.interrupted()

    def _serve(self, wire: Wire, connection: Connection) -> None:
        control = Control(connection, self.ledger, self.breaker, self._config.client.declare_interval_s)
        try:
            self.lent.attach(wire)
            leaving = False
            while True:
                now_s = time.monotonic()
                for received in wire.receive():
                    self._take(received)
                self.breaker.segment_settled(self.lent.settled)  # first: whoever waits wants both
                due_s = control.turn(now_s)
                if self._stop_at_s is not None:
                    if not leaving:
                        leaving = True
                        self.segments.retire_all()
                        self.lent.detach(wire)
                    if self._may_leave() or now_s >= self._stop_at_s:
                        self._say_goodbye(wire)
                        return
                    due_s = min(due_s, self._stop_at_s)
                else:
                    self.lent.turn(wire, now_s)
                wire.flush()
                self._poll(wire, control.socket, due_s - time.monotonic())
        finally:
            control.close()

    def _take(self, received: Received) -> None:
        """One message of the server."""
        message, descriptors = received
        if isinstance(message, Opened) and len(descriptors) <= 1:
            self.segments.opened(message, descriptors[0] if descriptors else None)
            return
        close_all(descriptors)
        if isinstance(message, Gone):
            self.segments.gone(message.segment)
        elif isinstance(message, Offering):
            self.offering.ring()
        elif isinstance(message, Attached):
            self.lent.attached(message)
        elif isinstance(message, Detached):
            self.lent.on_detached(message)
        elif isinstance(message, Refused):
            if message.seq == 0:
                raise SessionRefused(message.code, message.message)
            if not self.lent.refused(message):
                self.segments.refused(message.seq, message.message)
        else:
            raise RemoteProtocolError(f"session: got an unexpected {type(message).__name__}")

    def _may_leave(self) -> bool:
        return self.lent.detached and not self.segments.retiring and not self.segments.mapped()

    def _say_goodbye(self, wire: Wire) -> None:
        if self.segments.retiring:
            _log.warning("%s: copies still run at close; the session ends with this process", self._name)
            wire.flush()
            return
        wire.post(Bye())
        until_s = time.monotonic() + BYE_WAIT_S
        with contextlib.suppress(Unavailable):  # it stopped meanwhile: its successor finds us dead
            while not self._ended and (left_s := until_s - time.monotonic()) > 0:
                wire.flush()
                self._poll(wire, None, left_s)
                self._ended = wire.ended()

    # -- waiting, failing, ending

    def _poll(self, wire: Wire, control: zmq.Socket[bytes] | None, timeout_s: float) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_fd, zmq.POLLIN)
        poller.register(wire.fileno(), zmq.POLLIN | (zmq.POLLOUT if wire.has_unsent else 0))
        if control is not None:
            poller.register(control, zmq.POLLIN)
        ready = dict(poller.poll(math.ceil(max(0.0, timeout_s) * 1e3)))
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)

    def _sleep(self, seconds: float) -> None:
        """Pause, unless we are to stop. Wakes for anything else do not shorten it."""
        until_s = time.monotonic() + seconds
        poller = zmq.Poller()
        poller.register(self._wake_fd, zmq.POLLIN)
        while self._stop_at_s is None and (left_s := until_s - time.monotonic()) > 0:
            if poller.poll(math.ceil(left_s * 1e3)):
                os.eventfd_read(self._wake_fd)

    def _failed(self, error: Exception) -> None:
        """Log why there is no session, once for each cause; another version is an error that a person must
        mend, and a server that is just being started is none.
        """
        if isinstance(error, RemoteProtocolError):
            self.counters["protocol_errors"] += 1
        text = str(error)
        self.breaker.trip(None, text)
        level = logging.WARNING
        if isinstance(error, SessionRefused) and error.code == ErrorCode.VERSION:
            self._pause_s = VERSION_RETRY_S
            level = logging.ERROR
        now_s = time.monotonic()
        self._absent_since_s = min(self._absent_since_s, now_s)
        if isinstance(error, ServerAbsent) and self._config.server.autostart:
            if now_s - self._absent_since_s < AUTOSTART_PATIENCE_S:
                return
            text += f"; see {self._runtime.log_path}"
        if text != self._logged:
            self._logged = text
            _log.log(level, "%s: %s; requests are misses, trying again in the background", self._name, text)

    def _clean_up(self) -> None:
        self.lent.close()
        self.segments.enter(0)
        if not self.segments.retiring:  # else the session goes on until this process ends
            # Whoever has not heard our Bye needs the lock, to tell that we are gone, and removes it then.
            self._lock.release(remove=self._ended)
        self._context.term()
        with self._wake_guard:
            os.close(self._wake_fd)
            self._wake_fd = -1
