"""`RocksTier`: an engine's side of the database on the local SSD."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from vcache.errors import ArgumentError, ConfigError, EngineClosed, RemoteProtocolError, Unavailable
from vcache.limits import (
    KEY_BYTES,
    KEYS_PER_REQUEST_MAX,
    MIB,
    TIER_CONNECTIONS_MAX,
    TIER_LIST_MAX,
    TIER_OWNER_START_S,
    TIER_OWNER_TRY_INTERVAL_S,
    TIER_PACKET_BYTES_MAX,
    TIER_USES_MAX,
)
from vcache.logs import Line
from vcache.tiers.base import Found
from vcache.tiers.record import Flaw, Header, has_expired
from vcache.tiers.rocksdb import files, staging
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
from vcache.tiers.rocksdb.owner import SOCKET
from vcache.tiers.rocksdb.pieces import Helper
from vcache.tiers.rocksdb.spawn import private_directory, start_owner

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

_FIELD: Final = "tiers.rocksdb.directory"

_STAGING: Final = KEYS_PER_REQUEST_MAX * KEY_BYTES
"""All keys of one request."""

_AGAIN_S: Final = 0.01
"""How long to wait before an owner that is starting is tried again."""

_decoder: Final = msgspec.msgpack.Decoder(Reply)

ReplyType = TypeVar("ReplyType")


class _Link:
    """One connection to the owner, used by one thread at a time."""

    def __init__(self, directory: Path, hello: Hello, wait_s: float) -> None:
        self.staging, fd = staging.made(hello.staging_bytes)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(wait_s)
            self._dial(directory)
            hello = msgspec.structs.replace(hello, staging_bytes=self.staging.size)
            socket.send_fds(self._socket, [msgspec.msgpack.encode(hello)], [fd])
            self.expect(self._receive(), Done)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(fd)

    def _dial(self, directory: Path) -> None:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._socket.connect(f"/proc/self/fd/{folder}/{SOCKET}")
        finally:
            os.close(folder)

    def ask(self, request: Request, deadline_s: float) -> Reply:
        """One exchange; `deadline_s` on the monotonic clock. After any exception the link is of no use."""
        self._socket.settimeout(max(deadline_s - time.monotonic(), 1e-3))
        self._socket.send(msgspec.msgpack.encode(request))
        return self._receive()

    def tell(self, request: Request) -> None:
        """Say something that is not answered; an owner that does not read hears nothing of it."""
        with suppress(BlockingIOError):
            self._socket.send(msgspec.msgpack.encode(request), socket.MSG_DONTWAIT)

    def _receive(self) -> Reply:
        packet = self._socket.recv(TIER_PACKET_BYTES_MAX)
        if not packet:
            raise ConnectionResetError("the owner of the database has gone")
        reply: Reply = _decoder.decode(packet)
        return reply

    @staticmethod
    def expect(reply: Reply, wanted: type[ReplyType]) -> ReplyType:
        """The reply, if it is what is wanted. Raises Unavailable, RemoteProtocolError."""
        if isinstance(reply, Refused):
            raise Unavailable(reply.why)
        if not isinstance(reply, wanted):
            raise RemoteProtocolError(f"got {type(reply).__name__}, wanted {wanted.__name__}")
        return reply

    def close(self) -> None:
        self._socket.close()
        self.staging.close()


class RocksTier:
    """Chunks on a local SSD, as files of `directory`, with a database that is their index. Thread-safe.

    What is asked of the owner is answered by the deadline; a file is read and written for as long as the disk
    takes. The database belongs to a process of its own, started by whoever needs it first; every engine that
    names the directory shares it, and the newest engine's settings count. capacity_bytes: of all records; the
    least recently used go first. ttl_s: age at which a record expires, also one of before; 0: none.
    deadline_s: of one call. clock: seconds since 1970. observes: for people who look: the owner keeps the
    settings that it has, whole records are read however old they are, and that does not count as a use.

    Raises ConfigError for a directory that is not private, ArgumentError.
    """

    name: Final = "rocksdb"

    def __init__(
        self,
        directory: str | Path,
        *,
        capacity_bytes: int,
        ttl_s: float = 0.0,
        deadline_s: float = 5.0,
        clock: Callable[[], float] = time.time,
        observes: bool = False,
    ) -> None:
        if capacity_bytes < MIB:
            raise ArgumentError("capacity_bytes", capacity_bytes, f"at least {MIB}")
        self._directory = private_directory(Path(directory).expanduser().absolute(), _FIELD)
        self._observes = observes
        self._capacity_bytes = 0 if observes else capacity_bytes
        self._ttl_s = 0.0 if observes else ttl_s
        self._deadline_s = deadline_s
        self._clock = clock
        self._idle: list[_Link] = []
        self._used: list[bytes] = []
        self._guard = threading.Lock()
        self._is_closed = False
        self._helper = Helper()
        self._tried_s = -TIER_OWNER_TRY_INTERVAL_S
        self._never = threading.Event()
        self._start()

    # -- the tier

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Say of each key whether its chunk is here."""
        found: list[bool] = []
        for begin in range(0, len(keys), KEYS_PER_REQUEST_MAX):
            part = keys[begin : begin + KEYS_PER_REQUEST_MAX]
            with self._linked() as (link, deadline_s):
                _stage(link, part)
                link.expect(link.ask(Contains(len(part)), deadline_s), Done)
                found += [bool(flag) for flag in bytes(link.staging.view[: len(part)])]
        return found

    def get(self, key: bytes, into: torch.Tensor, layout: bytes) -> Found | None:
        """Fill `into` with the chunk of `key`; a record that is not exactly that is deleted."""
        target = files.view_of(into)
        header = files.read(files.path_of(self._directory, key), key, layout, target, self._helper)
        if header is None:
            self._tell_used(key)  # the owner looks whether it believes in a file that has gone
            return None
        if isinstance(header, Flaw):
            _log.warning(Line("a record is deleted", tier=self.name, key=key.hex(), flaw=header.value))
            with suppress(Unavailable, OSError):  # then it is a miss all the same, and deleted another time
                self._remove([key], damaged=True)
            return None
        expires_ms = header.expiry_ms(self._ttl_s)
        if not self._observes and has_expired(expires_ms, int(self._clock() * 1000)):
            return None
        self._tell_used(key)
        return Found(expires_ms)

    def _tell_used(self, key: bytes) -> None:
        with self._guard:
            if not self._observes and len(self._used) < TIER_USES_MAX:
                self._used.append(key)

    def put(self, key: bytes, chunk: torch.Tensor, layout: bytes, expires_ms: int = 0) -> bool:
        """Keep a copy of `chunk`, or not: room decides."""
        source = files.view_of(chunk)
        header = Header(layout, key, len(source), int(self._clock() * 1000), expires_ms, 0)
        with self._linked() as (link, deadline_s):
            reply = link.ask(Put(key, len(source)), deadline_s)
            if not isinstance(reply, Write):
                return bool(link.expect(reply, Done).count)
            if "/" in reply.name:
                raise RemoteProtocolError(f"put: told to write {reply.name}, which is no file's name")
            path = files.draft_path(self._directory, reply.name)
            try:
                done = self._written(path, header, source)
                # However long that took: the owner is still there for it.
                written = link.ask(Written(done), time.monotonic() + self._deadline_s)
            except BaseException:
                files.remove(path)  # an owner that was killed removes nothing
                raise
            return bool(link.expect(written, Done).count)

    def _written(self, path: str, header: Header, source: memoryview) -> bool:
        try:
            files.write(path, header, source)
        except OSError as error:
            _log.warning(Line("a record cannot be written", tier=self.name, error=str(error)))
            return False
        return True

    def remove(self, keys: Sequence[bytes]) -> int:
        """Forget these chunks; how many there were."""
        return self._remove(keys, damaged=False)

    def _remove(self, keys: Sequence[bytes], *, damaged: bool) -> int:
        removed = 0
        for begin in range(0, len(keys), KEYS_PER_REQUEST_MAX):
            part = keys[begin : begin + KEYS_PER_REQUEST_MAX]
            with self._linked() as (link, deadline_s):
                _stage(link, part)
                removed += link.expect(link.ask(Remove(len(part), damaged), deadline_s), Done).count
        return removed

    def clear(self) -> None:
        """Forget all chunks."""
        with self._linked() as (link, deadline_s):
            link.expect(link.ask(Clear(), deadline_s), Done)

    def close(self) -> None:
        """Let go of the owner, which ends when nobody is left."""
        with self._guard:
            self._is_closed = True
        self._never.set()
        self._helper.close()
        self._drop_idle()

    def _drop_idle(self) -> None:
        with self._guard:
            idle, self._idle = self._idle, []
        for link in idle:
            link.close()

    # -- for people and tests

    @property
    def directory(self) -> Path:
        """Where the files lie."""
        return self._directory

    def sync(self) -> bool:
        """Have everything on the disk: it survives a kill from now on."""
        with self._linked() as (link, deadline_s):
            return bool(link.expect(link.ask(Sync(), deadline_s), Done).count)

    def state(self) -> State:
        """How the owner is."""
        with self._linked() as (link, deadline_s):
            return link.expect(link.ask(Status(), deadline_s), State)

    def rows(self) -> Iterator[Row]:
        """Every record, in the order of keys."""
        after = b""
        while True:
            with self._linked() as (link, deadline_s):
                rows = link.expect(link.ask(Rows(after, TIER_LIST_MAX), deadline_s), Listing).rows
            yield from rows
            if len(rows) < TIER_LIST_MAX:
                return
            after = rows[-1].key

    # -- links

    @contextmanager
    def _linked(self) -> Iterator[tuple[_Link, float]]:
        """A link, and the deadline. A link on which something went wrong is closed."""
        deadline_s = time.monotonic() + self._deadline_s
        link = self._take(deadline_s)
        try:
            with self._guard:
                used, self._used = self._used, []
            if used:
                link.tell(Used(used))
            yield link, deadline_s
        except BaseException as error:
            link.close()
            if isinstance(error, ConnectionError):  # the others lead to the same owner, who has gone
                self._drop_idle()
            raise
        with self._guard:
            if not self._is_closed and len(self._idle) < TIER_CONNECTIONS_MAX:
                self._idle.append(link)
                return
        link.close()

    def _take(self, deadline_s: float) -> _Link:
        with self._guard:
            if self._is_closed:
                raise EngineClosed(f"tier {self.name!r} is closed")
            if self._idle:
                return self._idle.pop()
        hello = Hello(PROTOCOL, _STAGING, self._capacity_bytes, self._ttl_s)
        while True:
            try:
                return _Link(self._directory, hello, max(deadline_s - time.monotonic(), 1e-3))
            except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError) as error:
                self._start()
                if time.monotonic() + _AGAIN_S > deadline_s:
                    raise Unavailable(f"no owner of {self._directory} answers") from error
                self._never.wait(_AGAIN_S)

    def _start(self) -> None:
        with self._guard:
            now_s = time.monotonic()
            if self._is_closed or now_s - self._tried_s < TIER_OWNER_TRY_INTERVAL_S:
                return
            self._tried_s = now_s
        try:
            private_directory(self._directory, _FIELD)  # somebody may have removed it
        except ConfigError as error:
            _log.error(Line("no owner of the database can be started", error=str(error)))
            return
        if start_owner(self._directory, self._capacity_bytes, self._ttl_s):
            _log.info(Line("started the owner of a database", directory=str(self._directory)))

    def wait_ready(self, timeout_s: float = TIER_OWNER_START_S) -> bool:
        """Wait until the owner answers; whether it does."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            try:
                self.state()
                return True
            except (Unavailable, OSError):
                self._never.wait(_AGAIN_S)
        return False


def _stage(link: _Link, keys: Sequence[bytes]) -> None:
    packed = b"".join(keys)
    link.staging.view[: len(packed)] = packed
