"""`vcache-metadata`: the process that owns the extent table of one machine's pool.

One loop owns everything: requests from the ROUTER socket, sessions when the doorbell rings, a tick every
TICK_MS. The lock is taken before anything is read or bound, and a server whose lock or sockets were taken
away grants nothing more and ends.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import zmq

from metadata_server import doorbell
from metadata_server.connection import Connection
from metadata_server.connections import Door, allow_descriptors, inode_of
from metadata_server.directory import Directory, Policy
from metadata_server.errors import ServerConflict
from metadata_server.recovery import restore
from metadata_server.requests import Requests
from metadata_server.sessions import Sessions
from metadata_server.statistics import statistics
from vcache import config as configuration
from vcache import limits, logs
from vcache.config import Config
from vcache.errors import ConfigError
from vcache.locks import OwnerLock
from vcache.logs import Line
from vcache.runtime import RuntimeDir
from vcache.table import ExtentTable, TableDamaged

log = logging.getLogger("metadata_server.server")  # also when run with -m

TICK_MS: Final = 250
"""How often time passes in an idle server: leases and chunks expire on requests too, so this only bounds
tidiness.
"""
_DRAIN_MAX: Final = 10_000
"""Requests that an ending server still answers: more than clients can have under way, and an end to it."""
_DRAIN_QUIET_MS: Final = 50
"""After this long without a request an ending server has answered all that were sent to it."""
_BACKLOG: Final = 128

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_CONFIG: Final = 2
EXIT_CONFLICT: Final = 3
EXIT_USURPED: Final = 4


class Server:
    """Sockets and table of one running server. Raises ServerConflict, ConfigError, OSError when it cannot
    start.
    """

    def __init__(self, config: Config, *, idle_exit_s: float = 0.0) -> None:
        self._started_ns = time.monotonic_ns()
        self._idle_exit_s = idle_exit_s
        self._runtime = RuntimeDir.resolve(config.runtime_dir, group=config.server.group)
        self._lock = _take_lock(self._runtime)
        self._policy = Policy(
            eviction=config.server.policy,
            default_ttl_ms=int(config.server.default_ttl_s * 1000),
            lease_ms=config.server.lease_ms,
            pinned_bytes_max=int(config.server.pinned_bytes_max),
        )
        gc.disable()  # what is read from the table stays: to look through it again and again finds nothing
        table, directory, warm = _table_and_directory(self._runtime, config.server.extents_max, self._policy)
        gc.freeze()
        gc.enable()
        self._table = table
        if not self._runtime.on_tmpfs:
            log.warning(
                Line(
                    "the runtime directory is not on tmpfs: slower, and cold after a reboot",
                    path=self._runtime.path,
                )
            )
        self._table_fd = os.open(self._runtime.table_path, os.O_RDONLY | os.O_CLOEXEC)
        self._requests = Requests(
            directory,
            secrets.randbits(63) | 1,
            statistics=lambda: statistics(self._requests, self._sessions, self._started_ns),
            shutdown=self.drain,
            rebuild=self._rebuild,
            still_ours=self._lock.still_ours,
        )
        self._sessions = Sessions(self._requests, self._runtime, lambda: self._table_fd)
        self._sessions.take_over()
        self._bind()
        self._busy_ns = time.monotonic_ns()
        chunks = len(directory.chunks)
        log.info(Line("ready", pid=os.getpid(), runtime_dir=self._runtime.path, warm=warm, chunks=chunks))

    def _bind(self) -> None:
        """Both sockets, with the modes of the runtime directory; what an earlier server left of them is
        replaced.
        """
        self._context = zmq.Context(io_threads=1)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 200)
        self._router.setsockopt(zmq.RCVTIMEO, TICK_MS)
        self._router.setsockopt(zmq.RCVHWM, limits.FRAMES_WAITING_MAX)
        self._router.setsockopt(zmq.SNDHWM, limits.FRAMES_WAITING_MAX)
        # A frame that is somewhat too large is answered, a larger one costs the connection.
        self._router.setsockopt(zmq.MAXMSGSIZE, 2 * limits.FRAME_BYTES_MAX)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._runtime.session_path.unlink(missing_ok=True)
        mask = os.umask(0o777 & ~self._runtime.file_mode)
        try:
            self._listener.bind(str(self._runtime.session_path))
        finally:
            os.umask(mask)
        self._listener.listen(_BACKLOG)
        self._session_inode = self._runtime.session_path.stat().st_ino
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        watched = (self._listener.fileno(), self._sessions.epoll.fileno(), self._wake_read)
        # Before the door is open: nobody else can take the bell's routing id then.
        self._doorbell = doorbell.Doorbell(self._context, self._router, watched)
        self._bell_waits = False
        path, mode = self._runtime.rpc_path, self._runtime.file_mode
        self._door = Door(self._router, self._runtime.rpc_endpoint, path, mode)

    def _rebuild(self) -> Directory:
        """The directory anew from the table, after an error of our own; sessions go on and declare what they
        hold.
        """
        directory = restore(self._table, self._policy)
        directory.await_sessions(set(self._requests.directory.rights.sessions))
        return directory

    def drain(self) -> None:
        """Begin to end: requests that are here are answered, nothing new is granted. Safe in a signal
        handler.
        """
        self._requests.draining = True
        os.write(self._wake_write, b"x")

    def run(self) -> int:
        """Serve until drained, idle for long enough or usurped; returns the exit code."""
        next_tick_ns = 0
        while not self._requests.draining:
            try:
                sender, *frames = self._router.recv_multipart()
            except zmq.Again:
                frames = []
            now_ns = time.monotonic_ns()
            # Before the request: a server that slept must not grant anything if it was replaced meanwhile.
            if now_ns >= next_tick_ns:
                next_tick_ns = now_ns + TICK_MS * 1_000_000
                self._tick(now_ns)
                if self._requests.usurped:
                    return EXIT_USURPED
            if frames:
                self._receive(sender, frames, now_ns)
        self._answer_the_rest()
        log.info(Line("ended", chunks=len(self._requests.directory.chunks)))
        return EXIT_OK

    def _receive(self, sender: bytes, frames: list[bytes], now_ns: int) -> None:
        if sender == doorbell.SENDER:
            all_accepted = self._accept()
            self._sessions.dispatch()
            if all_accepted:
                self._doorbell.answered()
            self._bell_waits = not all_accepted
            return
        reply = self._requests.answer(frames, now_ns)
        if reply is not None:
            try:
                self._router.send_multipart((sender, reply), zmq.NOBLOCK)
            except zmq.Again:
                log.warning(Line("a client does not read its answers: one was dropped", bytes=len(reply)))
        self._requests.directory.catch_up()
        self._sessions.call()

    def _answer_the_rest(self) -> None:
        """Draining: answer what was sent already."""
        self._router.rcvtimeo = _DRAIN_QUIET_MS
        try:
            for _ in range(_DRAIN_MAX):
                sender, *frames = self._router.recv_multipart()
                if sender != doorbell.SENDER:  # who rings now comes to the next server
                    self._receive(sender, frames, time.monotonic_ns())
        except zmq.Again:
            return

    def _accept(self) -> bool:
        """Take up who waits at the session socket; False if some have to wait: until the next tick, or we
        would try for ever.
        """
        try:
            while True:
                sock, _ = self._listener.accept()
                self._sessions.accept(Connection(sock))
        except BlockingIOError:
            return True
        except OSError as error:
            log.warning(Line("a connection could not be accepted", error=str(error)))
            return False

    def _tick(self, now_ns: int) -> None:
        self._requests.directory.tick(now_ns)
        self._sessions.bury()
        if self._bell_waits:
            self._bell_waits = False
            self._doorbell.answered()
        if self._sessions.peers or self._sessions.awaited():
            self._busy_ns = now_ns
        elif self._idle_exit_s and now_ns - self._busy_ns > self._idle_exit_s * 1e9:
            log.info(Line("no session for a while: ending", idle_s=self._idle_exit_s))
            self._requests.draining = True
        self._door.tick()
        ours = self._lock.still_ours() and self._door.still_ours()
        if not ours or inode_of(self._runtime.session_path) != self._session_inode:
            log.error(
                Line(
                    "the lock or a socket of this server was taken away: ending",
                    runtime_dir=self._runtime.path,
                )
            )
            self._requests.usurped = True

    def close(self) -> None:
        """Free sockets and lock; the table stays for the next server unless nothing is in it."""
        os.write(self._wake_write, b"x")
        self._doorbell.close()
        self._sessions.close()
        self._router.close()
        self._context.term()
        self._listener.close()
        if not self._requests.usurped:
            self._runtime.session_path.unlink(missing_ok=True)
            self._door.remove()
            if not self._requests.directory.rights.sessions:
                self._runtime.table_path.unlink(missing_ok=True)
        for fd in (self._table_fd, self._wake_read, self._wake_write):
            os.close(fd)
        self._table.close()
        self._lock.release()


def _take_lock(runtime: RuntimeDir) -> OwnerLock:
    lock = OwnerLock(runtime.lock_path, mode=runtime.file_mode)
    if not lock.try_acquire():
        holder = f"process {lock.holder_pid() or 'in another container'}"
        raise ServerConflict(
            f"{runtime.path} has a metadata server already: {holder} holds {runtime.lock_path.name}"
        )
    return lock


def _table_and_directory(
    runtime: RuntimeDir, capacity: int, policy: Policy
) -> tuple[ExtentTable, Directory, bool]:
    """The pool that an earlier server left, or an empty one; the last tells which."""
    table = None
    try:
        table = ExtentTable.open(runtime.table_path)
        return table, restore(table, policy), True
    except FileNotFoundError:
        log.debug("no extent table is there: beginning with an empty one")
    except TableDamaged as damage:
        log.warning(Line("the extent table cannot be used: beginning with an empty one", reason=str(damage)))
        if table is not None:
            table.close()
    table = ExtentTable.create(runtime.table_path, capacity, mode=runtime.file_mode)
    return table, Directory(table, policy), False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vcache-metadata",
        description="The metadata server of one machine's VCache pool.",
        epilog=f"exit codes: {EXIT_OK} ended as asked, {EXIT_FAILED} failed, "
        f"{EXIT_CONFIG} wrong configuration or arguments, {EXIT_CONFLICT} another server has the runtime "
        f"directory, {EXIT_USURPED} the runtime directory was taken away",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML configuration (default: $VCACHE_CONFIG)")
    parser.add_argument("--runtime-dir", metavar="DIR", help="private directory of sockets, table and locks")
    parser.add_argument("--policy", choices=("lru", "s3fifo"), help="eviction policy")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--log-format", choices=("text", "json"))
    parser.add_argument("--log-file", metavar="FILE", help="log there instead of to standard error")
    parser.add_argument(
        "--idle-exit-s", type=float, metavar="S", help="end after S seconds without a session (0: never)"
    )
    parser.add_argument("--autostarted", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--check-config", action="store_true", help="check the configuration, print nothing if it is right"
    )
    return parser


@dataclass(frozen=True)
class _Start:
    config: Config
    idle_exit_s: float
    check_only: bool
    autostarted: bool


def _read_start(arguments: Sequence[str] | None) -> _Start:
    options = _parser().parse_args(arguments)
    given = {
        "runtime_dir": options.runtime_dir,
        "server.policy": options.policy,
        "server.idle_exit_s": options.idle_exit_s,
        "log.level": options.log_level,
        "log.format": options.log_format,
        "log.file": options.log_file,
    }
    config = configuration.load(
        options.config, **{name: value for name, value in given.items() if value is not None}
    ).config
    # A server that somebody started on purpose stays; one that a client started goes when nobody needs it.
    asked = options.autostarted or options.idle_exit_s is not None
    idle_exit_s = config.server.idle_exit_s if asked else 0.0
    return _Start(config, idle_exit_s, options.check_config, options.autostarted)


def _on_ending_signals(act: Callable[[int], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: act(number))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server; returns the exit code."""
    try:
        start = _read_start(arguments)
        if start.check_only:
            return EXIT_OK
        logs.configure(start.config.log.level, start.config.log.format, start.config.log.file)
        allow_descriptors()
        if start.autostarted:
            # The client that started us may be bound to one core: its limits are not ours.
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
        asked_to_end: list[int] = []  # while it starts: then it ends as soon as it can do so in order
        _on_ending_signals(asked_to_end.append)
        server = Server(start.config, idle_exit_s=start.idle_exit_s)
    except ConfigError as error:
        print(f"vcache-metadata: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except ServerConflict as error:
        print(f"vcache-metadata: {error}", file=sys.stderr)
        return EXIT_CONFLICT
    _on_ending_signals(lambda _: server.drain())
    if asked_to_end:
        server.drain()
    try:
        return server.run()
    except Exception:
        log.exception("the server failed; the next one goes on with its table")
        return EXIT_FAILED
    finally:
        server.close()


if __name__ == "__main__":
    sys.exit(main())
