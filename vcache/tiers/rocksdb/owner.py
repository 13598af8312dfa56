"""The process that owns one database: `python -m vcache.tiers.rocksdb.owner DIRECTORY …`.

RocksDB can be open in one process only. So this one has it, and says what is written and what goes; engines
read and write the records' files themselves. One thread serves all connections; it ends by itself when nobody
has been connected for TIER_OWNER_IDLE_S.
"""

from __future__ import annotations

import argparse
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from vcache import logs
from vcache.errors import RemoteProtocolError
from vcache.limits import (
    KEY_BYTES,
    TIER_LIST_MAX,
    TIER_OWNER_IDLE_S,
    TIER_PACKET_BYTES_MAX,
)
from vcache.locks import OwnerLock
from vcache.logs import Line
from vcache.tiers.rocksdb.database import Database, Draft, Entry
from vcache.tiers.rocksdb.messages import (
    PROTOCOL,
    Clear,
    Contains,
    Done,
    Hello,
    Listing,
    Put,
    Refused,
    Remove,
    Reply,
    Request,
    Row,
    Rows,
    State,
    Status,
    Sync,
    Used,
    Write,
    Written,
)
from vcache.tiers.rocksdb.staging import Staging, mapped

_log = logging.getLogger("vcache.tiers.rocksdb.owner")  # this module's name when it runs is another

LOCK: Final = "owner.lock"
SOCKET: Final = "owner.sock"
LOG: Final = "owner.log"

_TICK_S: Final = 0.25
_BACKLOG: Final = 128
_decoder: Final = msgspec.msgpack.Decoder(Request)


class _Connection:
    """One engine's."""

    def __init__(self, peer: socket.socket) -> None:
        self.peer = peer
        self.staging: Staging | None = None
        self.draft: Draft | None = None

    def close(self) -> None:
        self.peer.close()
        if self.staging is not None:
            self.staging.close()


class Owner:
    """Serves a database over the socket `listener` until `stop`, or until nobody has come for idle_s.

    Also until it is not `still_ours`: then somebody has removed the directory, and another process may own
    what is there now.
    """

    def __init__(
        self, database: Database, listener: socket.socket, idle_s: float, still_ours: Callable[[], bool]
    ) -> None:
        self._database = database
        self._still_ours = still_ours
        self._idle_s = idle_s
        self._selector = selectors.DefaultSelector()
        self._listener = listener
        self._connections: set[_Connection] = set()
        self._lonely_since_s = time.monotonic()
        self._stopping = False
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def stop(self, *_: object) -> None:
        """End after the request that is being served."""
        self._stopping = True

    def run(self) -> None:
        """Serve."""
        while not self._stopping and not self._is_idle() and self._still_ours():
            for ready, _ in self._selector.select(_TICK_S):
                if ready.data is None:
                    self._accept()
                else:
                    self._serve(ready.data)
            self._database.tick()
        for connection in list(self._connections):
            self._drop(connection)

    def _is_idle(self) -> bool:
        if self._connections:
            self._lonely_since_s = time.monotonic()
        return bool(self._idle_s) and time.monotonic() - self._lonely_since_s > self._idle_s

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError as error:
            _log.warning(Line("a connection could not be accepted", error=str(error)))
            return
        peer.setblocking(False)
        connection = _Connection(peer)
        self._connections.add(connection)
        self._selector.register(peer, selectors.EVENT_READ, connection)

    def _drop(self, connection: _Connection) -> None:
        self._selector.unregister(connection.peer)
        self._connections.discard(connection)
        if connection.draft is not None:
            self._database.abandon(connection.draft)
        connection.close()

    def _serve(self, connection: _Connection) -> None:
        """Answer one packet; whoever breaks the protocol, or does not read, is dropped."""
        try:
            packet, fds, _, _ = socket.recv_fds(connection.peer, TIER_PACKET_BYTES_MAX, 1)
            if not packet:
                self._drop(connection)
                return
            reply = self._answer(connection, packet, fds)
            if reply is not None:
                connection.peer.send(msgspec.msgpack.encode(reply))
        except (OSError, RemoteProtocolError, msgspec.MsgspecError) as error:
            _log.warning(Line("a connection is dropped", reason=str(error)))
            self._drop(connection)

    def _answer(self, connection: _Connection, packet: bytes, fds: list[int]) -> Reply | None:
        try:
            request = _decoder.decode(packet)
            if isinstance(request, Hello):
                return self._welcome(connection, request, fds)
        finally:
            for fd in fds:
                os.close(fd)
        if connection.staging is None:
            raise RemoteProtocolError("a request before Hello")
        if isinstance(request, Used):
            self._database.use(request.keys)
            return None
        if isinstance(request, Put):
            return self._put(connection, request)
        if isinstance(request, Written):
            return self._written(connection, request)
        return self._handle(request, connection.staging)

    def _welcome(self, connection: _Connection, hello: Hello, fds: list[int]) -> Reply:
        if hello.protocol != PROTOCOL:
            return Refused(f"this owner speaks protocol {PROTOCOL}, got {hello.protocol}")
        if len(fds) != 1 or connection.staging is not None:
            raise RemoteProtocolError("Hello wants one descriptor, once")
        connection.staging = mapped(fds[0], hello.staging_bytes)
        if hello.capacity_bytes:
            self._database.capacity_bytes, self._database.ttl_s = hello.capacity_bytes, hello.ttl_s
        return Done(os.getpid())

    def _handle(self, request: Request, staging: Staging) -> Reply:
        database = self._database
        if isinstance(request, Contains):
            keys = _keys(staging, request.count)
            staging.view[: len(keys)] = bytes(map(database.contains, keys))
            return Done(len(keys))
        if isinstance(request, Remove | Clear):
            return self._forget(request, staging)
        if isinstance(request, Sync):
            return Done(int(database.sync()))
        if isinstance(request, Rows):
            limit = max(0, min(request.limit, TIER_LIST_MAX))
            return Listing([_row(entry, database.ttl_s) for entry in database.rows(request.after, limit)])
        assert isinstance(request, Status)
        return self._state()

    def _forget(self, request: Remove | Clear, staging: Staging) -> Reply:
        try:
            if isinstance(request, Remove):
                keys = _keys(staging, request.count)
                return Done(self._database.remove(keys, damaged=request.damaged))
            held = len(self._database)
            self._database.clear()
            return Done(held)
        except OSError as error:
            return Refused(f"a record cannot be removed: {error}")

    def _put(self, connection: _Connection, request: Put) -> Reply:
        if len(request.key) != KEY_BYTES or connection.draft is not None:
            raise RemoteProtocolError("put: a key of a wrong length, or two at once")
        draft = self._database.begin(request.key, request.length)
        if isinstance(draft, bool):
            return Done(int(draft))
        connection.draft = draft
        return Write(os.path.basename(draft.path))

    def _written(self, connection: _Connection, request: Written) -> Reply:
        draft, connection.draft = connection.draft, None
        if draft is None:
            raise RemoteProtocolError("written: nothing was to be written")
        if not request.done:
            self._database.abandon(draft)
            return Done(0)
        return Done(int(self._database.commit(draft)))

    def _state(self) -> State:
        database = self._database
        return State(
            os.getpid(),
            len(database),
            database.held_bytes,
            database.capacity_bytes,
            database.ttl_s,
            len(self._connections),
            dict(database.counters),
        )


def _keys(staging: Staging, count: int) -> list[bytes]:
    if not 0 <= count * KEY_BYTES <= staging.size:
        raise RemoteProtocolError(f"{count} keys in a staging of {staging.size} bytes")
    packed = bytes(staging.view[: count * KEY_BYTES])
    return [packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)]


def _row(entry: Entry, ttl_s: float) -> Row:
    header = entry.header
    return Row(
        header.key, header.layout, entry.size, header.created_ms, header.expiry_ms(ttl_s), entry.used_ms
    )


def listen(directory: Path) -> socket.socket:
    """The owner's socket in its directory, whose path may be longer than a socket's: by a short way there."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        (directory / SOCKET).unlink(missing_ok=True)
        listener.bind(f"/proc/self/fd/{folder}/{SOCKET}")
        os.chmod(directory / SOCKET, 0o600)
        listener.listen(_BACKLOG)
    finally:
        os.close(folder)
    return listener


def main(arguments: list[str] | None = None) -> int:
    """Own the database of a directory until nobody wants it; 0 too if somebody owns it already."""
    parser = argparse.ArgumentParser(prog="vcache tier owner", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--capacity-bytes", type=int, required=True, help="0: until an engine says it")
    parser.add_argument("--ttl-s", type=float, default=0.0)
    parser.add_argument("--idle-s", type=float, default=TIER_OWNER_IDLE_S, help="0: never end by itself")
    options = parser.parse_args(arguments)
    logs.configure("info", "text", None)
    lock = OwnerLock(options.directory / LOCK)
    if not lock.try_acquire():
        return 0
    database = Database(options.directory, options.capacity_bytes, options.ttl_s, time.time)
    try:
        owner = Owner(database, listen(options.directory), options.idle_s, lock.still_ours)
        signal.signal(signal.SIGTERM, owner.stop)
        signal.signal(signal.SIGINT, owner.stop)
        _log.info(Line("owns the database", directory=str(options.directory), records=len(database)))
        owner.run()
        if lock.still_ours():
            (options.directory / SOCKET).unlink(missing_ok=True)
        else:
            _log.error(Line("the directory was removed or made anew", directory=str(options.directory)))
    finally:
        database.close()
        lock.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
