"""Clients of one pool, their requests and the server's answers, and what may be true at any time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from metadata_server.allocator import extent_size
from metadata_server.directory import Directory, Policy
from metadata_server.requests import Requests
from tests.support.model import Chunk, Client, Handle, Late, Memory, Place, overlap
from tests.support.pool import SECOND
from vcache import protocol
from vcache.limits import KIB
from vcache.protocol import ErrorCode, Request
from vcache.table import ExtentTable, TableReader

SIZES = {1: 16 * KIB, 2: 32 * KIB - 100, 3: 48 * KIB, 4: 80 * KIB}
"""Bytes of a chunk by its form (layout)."""

FORMS = (1, 1, 1, 2, 3, 4)
LEASE_MS = 2_000
FIRST = (0, 0, 0, 4, 20, 40, 100)
FATES = ("answered",) * 5 + ("lost", "not there yet", "answered late")


class Clients:
    """A directory behind frames, clients that ask it, and what they know.

    booked: by kind of request, what learns from its reply, and says whether it was allowed.
    """

    policy: Policy
    table: ExtentTable
    reader: TableReader

    def __init__(self) -> None:
        super().__init__()
        self.path = Path("/dev/shm") / f"vcache-test-pool-{os.getpid()}-{id(self)}"
        self.now_ns = SECOND
        self.memory = Memory()
        self.clients: dict[int, Client] = {}
        self.segments: dict[int, int] = {}
        self.lenders: dict[int, tuple[int, protocol.Attach]] = {}
        self.bound: dict[int, dict[Handle, Chunk]] = {}
        self.granted: dict[int, int] = {}
        self.copies: dict[tuple[int, Handle], Handle] = {}
        self.sessions = 0
        self.attached = 0
        self.epoch = 1
        self.booked: dict[type[Request], Callable[[Late, Any], None]] = {}

    def _serve(self, directory: Directory) -> None:
        self.evicted = 0
        self.requests = Requests(
            directory,
            self.epoch,
            statistics=lambda: protocol.Statistics({}, [], [], {}),
            shutdown=lambda: None,
            rebuild=self._never,
            still_ours=lambda: True,
        )

    @staticmethod
    def _never() -> Directory:
        raise AssertionError("the directory failed by its own fault")

    @property
    def directory(self) -> Directory:
        return self.requests.directory

    # -- requests under way

    def _clients(self, dice: Random, wanted: Callable[[Client], object] = lambda each: True) -> Client | None:
        there = [each for each in self.clients.values() if each.connected and wanted(each)]
        return dice.choice(there) if there else None

    def _send(self, client: Client, ask: Request, fate: str, hanging: tuple[Handle, ...] = ()) -> None:
        """A request, its answer booked at once, lost on its way back, or itself not there yet."""
        rid = client.next_rid()
        frame = protocol.encode_request(
            ask, rid=rid, session=client.session, token=client.token, epoch=self.epoch
        )
        late = Late(rid, frame, ask, {handle: client.reserved.pop(handle) for handle in hanging})
        client.under_way.append(late)
        if fate == "not there yet":
            return
        self._arrive(client, late)
        if fate == "answered":
            self._hear(client, late)
        elif fate == "lost":
            client.under_way.remove(late)

    def _arrive(self, client: Client, late: Late) -> None:
        """The request reaches the server."""
        late.done = True
        answer = self.requests.answer([late.frame], self._tick())
        if answer is None:
            assert isinstance(late.ask, protocol.Release)
            return
        decoded = protocol.decode_answer(answer)
        assert decoded.rid == late.rid
        reply = protocol.decode_reply(decoded.body)
        if isinstance(reply, protocol.Error):
            self._refused(client, late, reply)
            return
        assert not isinstance(late.ask, protocol.Release)
        if late.rid <= client.settled:
            assert isinstance(late.ask, protocol.Declare | protocol.Touch), "a settled request came through"
        client.answered[late.rid] = late.frame, answer
        booked = self.booked.get(type(late.ask))
        if booked is not None:
            booked(late, reply)

    def _hear(self, client: Client, late: Late) -> None:
        """The answer reaches the client, who passes it over if it has given the request up."""
        client.under_way.remove(late)
        if late.given_up:
            return
        for handle, (place, stamp) in late.reserved.items():
            if not stamp:
                stamp = self.memory.new_stamp()
                self.memory.write(place, stamp)
            client.reserved[handle] = place, stamp
        if late.pinned:
            client.pins[late.rid] = late.pinned
        if late.leased:
            client.leases[late.rid] = late.leased

    def _refused(self, client: Client, late: Late, error: protocol.Error) -> None:
        stale = late.rid <= client.settled and error.code == ErrorCode.STALE
        foreign = error.code in (ErrorCode.EPOCH, ErrorCode.TOKEN) and late.given_up
        assert stale or foreign, error

    def _tick(self) -> int:
        self.now_ns += 1_000
        return self.now_ns

    # -- what is there, and what may be

    def _likely(self, dice: Random) -> tuple[int, int]:
        """A key that is mostly there, as form and number."""
        there = [number for number, replicas in self.bound.items() if replicas]
        if there and dice.random() < 0.8:
            form, first = divmod(dice.choice(there), 1000)
            return form, first
        return dice.choice(FORMS), dice.choice(FIRST)

    def _unexpired(self, number: int) -> list[Chunk]:
        chunks = self.bound.get(number, {}).values()
        return [chunk for chunk in chunks if not 0 < chunk.expiry_ns <= self.now_ns]

    def _check_grant(self, place: Place, size: int) -> None:
        """Nobody else's, inside its segment, and under a generation that it never had."""
        assert place.length == extent_size(size)
        assert 4 * KIB <= place.offset <= place.offset + place.length <= self.segments[place.segment]
        assert place.generation > self.granted.get(place.index, -1), f"{place} was granted before"
        self.granted[place.index] = place.generation
        for client in self.clients.values():
            taken = [*client.writable(), *(chunk.place for chunk in client.pinned())]
            assert not overlap(place, taken), f"{place} is session {client.session}'s"
        found = [chunk.place for replicas in self.bound.values() for chunk in replicas.values()]
        assert not overlap(place, found), f"{place} can still be found under a key"

    def _learn_expiries(self) -> None:
        for replicas in self.bound.values():
            for handle, chunk in list(replicas.items()):
                if 0 < chunk.expiry_ns <= self.now_ns:
                    del replicas[handle]

    def _learn_evictions(self, kept: set[int]) -> None:
        """Take away what the directory gave up, and check that it might; nothing appears by itself."""
        self._learn_expiries()
        directory = self.directory
        there = {
            (int.from_bytes(each, "big"), index, self.table.generation(index))
            for each, first in directory.chunks.items()
            for index in (first, *directory.replicas.get(each, ()))
        }
        known = {(number, *handle) for number, replicas in self.bound.items() for handle in replicas}
        assert there <= known, "a chunk is there that nobody committed, or that was removed"
        pinned = {chunk for client in self.clients.values() for chunk in client.pinned()}
        leased = {
            chunk
            for client in self.clients.values()
            for ends_ns, held in client.leases.values()
            if self.now_ns < ends_ns
            for chunk in held.values()
        }
        for number, index, generation in known - there:
            chunk = self.bound[number].pop((index, generation))
            assert chunk not in pinned, "a pinned chunk was evicted"
            assert chunk not in leased, "a leased chunk was evicted"
            assert number not in kept or self.bound[number], "a chunk was evicted that the same reserve found"
        assert len(known - there) == directory.counters["evicted"] - self.evicted
        self.evicted = directory.counters["evicted"]
