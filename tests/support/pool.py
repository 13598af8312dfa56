"""A pool without processes: a directory over a real table file, asked directly, with a clock that we move."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TypeVar

import numpy as np

from metadata_server.directory import Directory, Policy
from metadata_server.recovery import restore
from vcache import protocol
from vcache.limits import FINGERPRINT_BYTES, KEY_BYTES, KIB, NAMESPACE_BYTES
from vcache.protocol import EXTENT, Extents, Reply, Request
from vcache.table import ExtentTable, TableReader

BOOT = b"0d3f2b6e-5f0c-4a52-9a55-0123456789ab"
DATA_OFFSET = 4 * KIB
MS = 1_000_000
SECOND = 1_000 * MS

_Reply = TypeVar("_Reply", bound=Reply)


def key(number: int) -> bytes:
    """A chunk key; different numbers, different keys."""
    return number.to_bytes(KEY_BYTES, "big")


def keys(*numbers: int) -> bytes:
    """Packed chunk keys."""
    return b"".join(map(key, numbers))


def layout(number: int) -> bytes:
    """A layout fingerprint."""
    return number.to_bytes(FINGERPRINT_BYTES, "big")


def namespace(number: int) -> bytes:
    """A model's namespace."""
    return number.to_bytes(NAMESPACE_BYTES, "big")


def handles(extents: Extents) -> bytes:
    """Extents as their owner names them."""
    return protocol.pack_handles(extents["index"], extents["generation"])


def lengths(*numbers: int) -> bytes:
    """Packed lengths."""
    return np.array(numbers, "<u8").tobytes()


def attach(number: int, size: int, *, rank: int = 0, numa: int = -1) -> protocol.Attach:
    """Lend segment `number` with room for `size` bytes of extents."""
    return protocol.Attach(
        seq=1,
        descriptor=b"",
        segment_id=number.to_bytes(16, "big"),
        incarnation=number,
        device=f"shm:{number}",
        size=DATA_OFFSET + size,
        data_offset=DATA_OFFSET,
        rank=rank,
        numa=numa,
    )


def make(tmp_path: Path, *sizes: int, policy: Policy | None = None) -> Pool:
    """A pool with a segment of each of these sizes."""
    return Pool(tmp_path / "several", segments=sizes, policy=policy)


class Pool:
    """A directory, its table and its clock. Sessions are numbers; `rid`s rise by themselves."""

    def __init__(
        self,
        path: Path,
        *,
        capacity: int = 4096,
        policy: Policy | None = None,
        segments: tuple[int, ...] = (),
    ) -> None:
        self.path = path
        self.policy = policy or Policy()
        self.now_ns = SECOND
        self.table = ExtentTable.create(path, capacity, boot=BOOT)
        self.directory = Directory(self.table, self.policy)
        self.rids = itertools.count(1)
        self.rid = 0
        self.checks = True
        self.segments = [
            self.directory.add_segment(1, attach(number, size))
            for number, size in enumerate(segments, start=1)
        ]

    def close(self) -> None:
        """Close the table, and with it the directory."""
        del self.directory
        self.table.close()

    def restart(self, *alive: int) -> None:
        """Kill the server and start the next one, which finds these sessions alive."""
        self.close()
        self.table = ExtentTable.open(self.path, boot=BOOT)
        self.directory = restore(self.table, self.policy)
        self.directory.await_sessions(alive)
        self.check()

    def check(self) -> None:
        """Prove that everything adds up."""
        if self.checks:
            self.directory.check()

    def reader(self) -> TableReader:
        """A client's view of the table, for the fence."""
        return TableReader(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))

    def ask(self, session: int, request: Request, want: type[_Reply]) -> _Reply:
        """Make a request, 20 us after the last one; its rid is in `self.rid`."""
        self.rid = next(self.rids)
        self.now_ns += 20_000
        reply = self.directory.handle(session, self.rid, request, self.now_ns)
        self.check()
        assert isinstance(reply, want), reply
        return reply

    def wait_ms(self, ms: int) -> None:
        """Let time pass."""
        self.now_ns += ms * MS
        self.directory.tick(self.now_ns)
        self.check()

    # -- requests in short

    def reserve(
        self, session: int, *numbers: int, count: int = 0, size: int = 4 * KIB, near: int = 0, form: int = 1
    ) -> Extents:
        """The extents granted for these keys, or `count` without keys."""
        ask = protocol.Reserve(layout(form), size, keys(*numbers), count, near)
        return protocol.unpack(self.ask(session, ask, protocol.Reserved).extents, EXTENT)

    def commit(
        self,
        session: int,
        extents: Extents,
        *numbers: int,
        ttl_ms: int = -1,
        replica: bool = False,
        space: int = 1,
    ) -> list[int]:
        """The outcomes of binding these keys to whole extents."""
        ask = protocol.Commit(
            handles(extents),
            keys(*numbers),
            lengths(*extents["length"].tolist()),
            namespace(space),
            ttl_ms,
            replica,
        )
        return list(self.ask(session, ask, protocol.Committed).outcomes)

    def store(
        self, session: int, *numbers: int, size: int = 4 * KIB, near: int = 0, form: int = 1
    ) -> Extents:
        """Reserve and commit; the extents of those that fitted."""
        extents = self.reserve(session, *numbers, size=size, near=near, form=form)
        missing = [number for number in numbers if key(number) not in self.directory.chunks]
        self.commit(session, extents, *missing[: len(extents)])
        return extents

    def abort(self, session: int, extents: Extents) -> int:
        """How many reservations ended."""
        return self.ask(session, protocol.Abort(handles(extents)), protocol.Done).count

    def acquire(
        self,
        session: int,
        *numbers: int,
        pin: bool = False,
        prefix: bool = True,
        near: int = 0,
        form: int = 1,
    ) -> Extents:
        """The extents granted to read."""
        ask = protocol.Acquire(keys(*numbers), layout(form), pin, prefix, near)
        return protocol.unpack(self.ask(session, ask, protocol.Acquired).extents, EXTENT)

    def release(self, session: int, right: int, extents: Extents | None = None) -> None:
        """End a right, or a part of it."""
        part = b"" if extents is None else handles(extents)
        self.ask(session, protocol.Release(right, part), protocol.Done)

    def declare(
        self,
        session: int,
        reservations: Extents | None = None,
        pins: dict[int, Extents] | None = None,
        settled: int = -1,
    ) -> int:
        """How much was freed by saying that this is all (up to the request before, unless `settled` says)."""
        held = b"" if reservations is None else handles(reservations)
        rights = [protocol.Right(rid, handles(extents)) for rid, extents in (pins or {}).items()]
        upto = self.rid if settled < 0 else settled
        return self.ask(session, protocol.Declare(upto, held, rights), protocol.Done).count

    def there(self, *numbers: int, form: int = 1) -> list[int]:
        """Which of these keys are found."""
        found = self.ask(1, protocol.Lookup(keys(*numbers), layout(form), True), protocol.Found)
        return [number for number, flag in zip(numbers, found.flags, strict=True) if flag]

    def remove(self, *numbers: int) -> int:
        """How many chunks were forgotten."""
        return self.ask(1, protocol.Remove(keys(*numbers)), protocol.Done).count

    def states(self) -> dict[str, int]:
        """How many extents are in which state, those aside that nobody has."""
        found = [self.table.state(index).name for index in self.table.in_use().tolist()]
        return {name: found.count(name) for name in sorted(set(found) - {"FREE", "EMPTY"})}
