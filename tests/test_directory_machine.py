"""Whatever clients do, lose and die of, and whenever the server is killed: bytes found are the bytes stored."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from metadata_server.allocator import extent_size
from metadata_server.directory import NS, Directory, Policy
from metadata_server.recovery import restore
from metadata_server.requests import Credentials, Requests
from tests.support.model import Chunk, Client, Handle, Late, Memory, Place, overlap, places
from tests.support.pool import BOOT, MS, SECOND, attach, key, layout, lengths, namespace
from vcache import protocol
from vcache.limits import KIB, MIB, TOKEN_BYTES
from vcache.protocol import EXTENT, ErrorCode, Outcome, Request
from vcache.table import ExtentTable, State, TableReader

SIZES = {1: 16 * KIB, 2: 32 * KIB - 100, 3: 48 * KIB, 4: 80 * KIB}
"""Bytes of a chunk by its form (layout)."""

FORMS = st.sampled_from((1, 1, 1, 2, 3, 4))
LEASE_MS = 2_000
FATES = st.sampled_from(("answered",) * 5 + ("lost", "delayed"))


class PoolMachine(RuleBasedStateMachine):
    """Clients of one pool. Each rule is one event; what is allowed is said in `_booked_...` and the invariants."""

    eviction = "lru"

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
        self.sessions = 0
        self.attached = 0
        self.epoch = 1

    @initialize(data=st.data(), small_quota=st.booleans())
    def start(self, data: st.DataObject, small_quota: bool) -> None:
        self.policy = Policy(
            eviction=self.eviction,  # type: ignore[arg-type]
            default_ttl_ms=data.draw(st.sampled_from((0, 0, 5_000))),
            lease_ms=LEASE_MS,
            pinned_bytes_max=300 * KIB if small_quota else 8 * MIB,
        )
        self.table = ExtentTable.create(self.path, data.draw(st.sampled_from((90, 2048, 2048))), boot=BOOT)
        self.reader = TableReader(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        self._serve(Directory(self.table, self.policy))
        for _ in range(2):
            self.new_session()
        self.add_segment(data, MIB, 0)

    def _serve(self, directory: Directory) -> None:
        self.evicted = 0
        self.requests = Requests(
            directory,
            self.epoch,
            statistics=lambda: protocol.Statistics({}, [], [], {}),
            shutdown=lambda: None,
            rebuild=self._never,
        )

    @staticmethod
    def _never() -> Directory:
        raise AssertionError("the directory failed by its own fault")

    @property
    def directory(self) -> Directory:
        return self.requests.directory

    # -- who there is

    def _clients(self, data: st.DataObject, wanted: Callable[[Client], Any] = lambda each: True) -> Client | None:
        there = [each for each in self.clients.values() if each.connected and wanted(each)]
        return data.draw(st.sampled_from(there)) if there else None

    @precondition(lambda self: len(self.clients) < 4)
    @rule()
    def new_session(self) -> None:
        self.sessions += 1
        self.clients[self.sessions] = Client(self.sessions, self.sessions.to_bytes(TOKEN_BYTES, "big"))
        self._hello(self.clients[self.sessions])

    def _hello(self, client: Client) -> None:
        self.requests.sessions[client.session] = Credentials(client.token)
        self.directory.rights.of(client.session)
        client.connected = True

    @precondition(lambda self: len(self.clients) > 1)
    @rule(data=st.data())
    def session_dies(self, data: st.DataObject) -> None:
        self._die(data.draw(st.sampled_from(sorted(self.clients))))

    def _die(self, session: int) -> None:
        del self.clients[session]
        self.requests.sessions.pop(session, None)
        self.directory.end_session(session)
        for number in [number for number, (lender, _) in self.lenders.items() if lender == session]:
            self._drop(number)

    @precondition(lambda self: len(self.segments) < 3)
    @rule(data=st.data(), size=st.sampled_from((MIB // 2, MIB, 3 * MIB)), rank=st.sampled_from((0, 0, 1)))
    def add_segment(self, data: st.DataObject, size: int, rank: int) -> None:
        client = self._clients(data)
        if client is None:
            return
        self.attached += 1
        asked = attach(self.attached, size, rank=rank)
        number = self.directory.add_segment(client.session, asked)
        assert number not in self.segments
        self.segments[number] = asked.size
        self.lenders[number] = client.session, asked
        self.memory.add(number, asked.size)

    @precondition(lambda self: self.segments)
    @rule(data=st.data())
    def drop_segment(self, data: st.DataObject) -> None:
        self._drop(data.draw(st.sampled_from(sorted(self.segments))))

    def _drop(self, number: int) -> None:
        self.directory.drop_segment(number)
        del self.segments[number], self.lenders[number]
        for client in self.clients.values():
            client.forget_segment(number)
        for replicas in self.bound.values():
            for handle in [handle for handle, chunk in replicas.items() if chunk.place.segment == number]:
                del replicas[handle]

    # -- the server's end and its successor's beginning

    @rule(data=st.data())
    def server_is_killed(self, data: st.DataObject) -> None:
        alive = {session for session in sorted(self.clients) if data.draw(st.sampled_from((True, True, False)))}
        self.requests.directory = None  # type: ignore[assignment]
        self.table.close()
        self.epoch += 1
        self.table = ExtentTable.open(self.path, boot=BOOT)
        self._serve(restore(self.table, self.policy))
        self.directory.check()
        self.directory.await_sessions(alive)
        for session in set(self.clients) - alive:
            del self.clients[session]
            for number in [number for number, (lender, _) in self.lenders.items() if lender == session]:
                self._drop(number)
        for client in self.clients.values():
            client.connected = False
            client.settled = 0
            client.answered.clear()
            client.leases = {rid: (0, held) for rid, (_, held) in client.leases.items()}
            for late in client.under_way:
                late.given_up = True
        for replicas in self.bound.values():
            for handle, chunk in replicas.items():
                whole = -(-chunk.expiry_ns // NS) * NS
                replicas[handle] = Chunk(chunk.place, chunk.stamp, chunk.form, chunk.space, whole)

    @precondition(lambda self: any(not client.connected for client in self.clients.values()))
    @rule(data=st.data(), at_once=st.booleans())
    def client_comes_back(self, data: st.DataObject, at_once: bool) -> None:
        away = [client for client in self.clients.values() if not client.connected]
        client = data.draw(st.sampled_from(away))
        client.token = os.urandom(TOKEN_BYTES)
        self._hello(client)
        for number, (lender, asked) in self.lenders.items():
            if lender == client.session:
                assert self.directory.add_segment(client.session, asked) == number
        if at_once:
            self._declare(client)

    # -- requests under way

    def _send(self, client: Client, ask: Request, fate: str, hanging: tuple[Handle, ...] = ()) -> None:
        """A request, its answer booked at once, lost on its way back, or itself not there yet."""
        rid = client.next_rid()
        frame = protocol.encode_request(
            ask, rid=rid, session=client.session, token=client.token, epoch=self.epoch
        )
        late = Late(rid, frame, ask, {handle: client.reserved.pop(handle) for handle in hanging})
        client.under_way.append(late)
        if fate != "delayed":
            self._arrive(client, late, fate == "answered")

    def _arrive(self, client: Client, late: Late, is_heard: bool) -> None:
        """The request reaches the server, and its answer the client if `is_heard`."""
        client.under_way.remove(late)
        heard = is_heard and not late.given_up
        answer = self.requests.answer([late.frame], self._tick())
        if isinstance(late.ask, protocol.Release):
            assert answer is None
            return
        assert answer is not None
        decoded = protocol.decode_answer(answer)
        assert decoded.rid == late.rid
        reply = protocol.decode_reply(decoded.body)
        if isinstance(reply, protocol.Error):
            self._refused(client, late, reply)
            return
        if late.rid <= client.settled:
            assert isinstance(late.ask, protocol.Declare | protocol.Touch), "a settled request was carried out"
        client.answered[late.rid] = late.frame, answer
        booked = {
            protocol.Reserve: self._booked_reserve,
            protocol.Commit: self._booked_commit,
            protocol.Abort: self._booked_abort,
            protocol.Acquire: self._booked_acquire,
            protocol.Remove: self._booked_removal,
            protocol.Clear: self._booked_removal,
        }.get(type(late.ask))
        if booked is not None:
            booked(client, late, reply, heard)

    def _refused(self, client: Client, late: Late, error: protocol.Error) -> None:
        stale = late.rid <= client.settled and error.code == ErrorCode.STALE
        foreign = error.code in (ErrorCode.EPOCH, ErrorCode.TOKEN) and late.given_up
        assert stale or foreign, error

    @rule(data=st.data(), is_heard=st.booleans())
    def delayed_request_arrives(self, data: st.DataObject, is_heard: bool) -> None:
        client = self._clients(data, lambda each: each.under_way)
        if client is not None:
            self._arrive(client, data.draw(st.sampled_from(client.under_way)), is_heard)

    @rule(data=st.data())
    def client_gives_up(self, data: st.DataObject) -> None:
        client = self._clients(data, lambda each: each.under_way)
        if client is not None:
            data.draw(st.sampled_from(client.under_way)).given_up = True

    @rule(data=st.data())
    def request_is_sent_again(self, data: st.DataObject) -> None:
        client = self._clients(data, lambda each: each.answered)
        if client is not None:
            frame, answer = client.answered[data.draw(st.sampled_from(sorted(client.answered)))]
            ask = protocol.decode_request(protocol.decode_envelope(frame).body)
            if isinstance(ask, protocol.Reserve | protocol.Commit | protocol.Acquire | protocol.Remove):
                assert self.requests.answer([frame], self._tick()) == answer

    def _tick(self) -> int:
        self.now_ns += 1_000
        return self.now_ns

    # -- writing

    @rule(
        data=st.data(),
        form=FORMS,
        first=st.integers(0, 40),
        count=st.sampled_from((1, 3, 8, 40)),
        fate=FATES,
        keyed=st.booleans(),
        near=st.integers(0, 3),
    )
    def reserve(
        self, data: st.DataObject, form: int, first: int, count: int, fate: str, keyed: bool, near: int
    ) -> None:
        client = self._clients(data)
        if client is None:
            return
        numbers = range(form * 1000 + first, form * 1000 + first + count) if keyed else ()
        self._reserve(client, form, numbers, count, near, fate)

    def _reserve(
        self, client: Client, form: int, numbers: range | tuple[()], count: int, near: int, fate: str
    ) -> None:
        packed = b"".join(map(key, numbers))
        self._send(client, protocol.Reserve(layout(form), SIZES[form], packed, count, near), fate)

    def _booked_reserve(
        self, client: Client, late: Late, reply: protocol.Reserved, heard: bool
    ) -> None:
        ask = late.ask
        assert isinstance(ask, protocol.Reserve)
        numbers = [int.from_bytes(each, "big") for each in protocol.split_keys(ask.keys)]
        for number, flag in zip(numbers, reply.present, strict=True):
            assert bool(self.bound.get(number)) >= bool(flag), f"key {number} is said to be there"
        assert reply.wanted == (reply.present.count(0) if numbers else ask.count)
        granted = places(protocol.unpack(reply.extents, EXTENT))
        assert len(granted) <= reply.wanted
        self._learn_evictions(kept={n for n, flag in zip(numbers, reply.present, strict=True) if flag})
        assert all(
            bool(self.bound.get(number)) == bool(flag) for number, flag in zip(numbers, reply.present, strict=True)
        )
        for place in granted:
            self._check_grant(place, ask.size)
        if heard:
            for place in granted:
                stamp = self.memory.new_stamp()
                self.memory.write(place, stamp)
                client.reserved[place.handle] = place, stamp
        if len(granted) < reply.wanted and not self.directory.allocator.table_full:
            self._check_full(extent_size(ask.size), {n for n in numbers if self.bound.get(n)})

    def _check_grant(self, place: Place, size: int) -> None:
        """Nobody else's, inside its segment, and under a generation that it never had."""
        assert place.length == extent_size(size)
        assert 4 * KIB <= place.offset <= place.offset + place.length <= self.segments[place.segment]
        assert place.generation > self.granted.get(place.index, -1), f"{place} was granted before"
        self.granted[place.index] = place.generation
        for client in self.clients.values():
            taken = [held for held, _ in client.reserved.values()]
            taken += [chunk.place for chunk in client.pinned()]
            taken += [held for late in client.under_way if not late.given_up for held, _ in late.hanging.values()]
            assert not overlap(place, taken), f"{place} is session {client.session}'s"
        found = [chunk.place for replicas in self.bound.values() for chunk in replicas.values()]
        assert not overlap(place, found), f"{place} can still be found under a key"

    def _check_full(self, size: int, kept: set[int]) -> None:
        """Less was granted than asked: nothing of this size could have been given up."""
        for number, replicas in self.bound.items():
            for index, _ in replicas:
                same_size = int(self.table.records["size"][index]) == size
                assert not same_size or number in kept or self.directory.rights.held(index), (
                    f"extent {index} of key {number} could have been given up"
                )

    @rule(data=st.data())
    def a_stopped_writer_wakes_up(self, data: st.DataObject) -> None:
        """What it still owns it may write to, whatever happened meanwhile."""
        if self.clients:
            client = data.draw(st.sampled_from(list(self.clients.values())))
            for place, stamp in client.reserved.values():
                self.memory.write(place, stamp)

    @rule(
        data=st.data(),
        count=st.sampled_from((1, 8, 40)),
        first=st.integers(0, 40),
        fate=FATES,
        ttl_ms=st.sampled_from((-1, -1, 0, 500)),
        replica=st.booleans(),
        space=st.integers(1, 2),
    )
    def commit(
        self, data: st.DataObject, count: int, first: int, fate: str, ttl_ms: int, replica: bool, space: int
    ) -> None:
        client = self._clients(data, lambda each: each.reserved)
        if client is not None:
            self._commit(client, first, count, ttl_ms, replica, space, fate)

    def _commit(
        self, client: Client, first: int, count: int, ttl_ms: int, replica: bool, space: int, fate: str
    ) -> None:
        held = [place for place, _ in client.reserved.values()][:count]
        forms = {extent_size(size): form for form, size in SIZES.items()}
        numbers = [forms[place.length] * 1000 + first + at for at, place in enumerate(held)]
        sizes = [SIZES[forms[place.length]] for place in held]
        ask = protocol.Commit(
            protocol.pack_handles([p.index for p in held], [p.generation for p in held]),
            b"".join(map(key, numbers)),
            lengths(*sizes),
            namespace(space),
            ttl_ms,
            replica,
        )
        self._send(client, ask, fate, tuple(place.handle for place in held))

    def _booked_commit(
        self, client: Client, late: Late, reply: protocol.Committed, heard: bool
    ) -> None:
        ask = late.ask
        assert isinstance(ask, protocol.Commit)
        named = [handle for handle in protocol.unpack(ask.handles, protocol.HANDLE).tolist()]
        numbers = [int.from_bytes(each, "big") for each in protocol.split_keys(ask.keys)]
        sizes = protocol.unpack(ask.lengths, protocol.np.dtype("<u8")).tolist()
        ttl_ms = self.policy.default_ttl_ms if ask.ttl_ms < 0 else ask.ttl_ms
        for at in reversed(range(len(named))):
            handle, number, outcome = named[at], numbers[at], reply.outcomes[at]
            place, stamp = late.hanging.get(handle, (None, 0))
            if place is None or outcome == Outcome.STALE:
                assert place is None, f"{place} was this session's"
                assert outcome == Outcome.STALE
            elif outcome == Outcome.LOST:
                assert self.bound.get(number), f"key {number} has no other copy"
                if heard:
                    client.reserved[handle] = place, stamp
            else:
                others = [each.place.segment for each in self.bound.get(number, {}).values()]
                assert place.segment not in others if ask.replica else not others
                assert self.memory.holds(place, stamp), "somebody wrote to a reservation"
                chunk = Place(place.index, place.generation, place.segment, place.offset, sizes[at])
                self.bound.setdefault(number, {})[handle] = Chunk(
                    chunk,
                    stamp,
                    number // 1000,
                    int.from_bytes(ask.namespace, "big"),
                    self.now_ns + ttl_ms * MS if ttl_ms else 0,
                )

    @rule(data=st.data(), form=FORMS, first=st.integers(0, 40), count=st.sampled_from((4, 20, 60)))
    def store(self, data: st.DataObject, form: int, first: int, count: int) -> None:
        """What engines do all day: fills the pool."""
        client = self._clients(data)
        if client is None:
            return
        before = set(client.reserved)
        self._reserve(client, form, range(form * 1000 + first, form * 1000 + first + count), 0, 0, "answered")
        fresh = {handle: client.reserved.pop(handle) for handle in set(client.reserved) - before}
        client.reserved = fresh | client.reserved
        if fresh:
            self._commit(client, first, len(fresh), -1, False, 1, "answered")

    @rule(data=st.data(), count=st.integers(1, 10), fate=FATES)
    def abort(self, data: st.DataObject, count: int, fate: str) -> None:
        client = self._clients(data, lambda each: each.reserved)
        if client is None:
            return
        held = [place for place, _ in client.reserved.values()][:count]
        packed = protocol.pack_handles([p.index for p in held], [p.generation for p in held])
        for place in held:  # nothing of the caller touches them again
            del client.reserved[place.handle]
        self._send(client, protocol.Abort(packed), fate)

    def _booked_abort(
        self, client: Client, late: Late, reply: protocol.Done, heard: bool
    ) -> None:
        assert isinstance(late.ask, protocol.Abort)
        assert reply.count <= len(late.ask.handles) // 8

    # -- reading

    @rule(
        data=st.data(),
        form=FORMS,
        first=st.integers(0, 40),
        count=st.sampled_from((1, 4, 30)),
        pin=st.booleans(),
        prefix=st.booleans(),
        near=st.integers(0, 3),
        fate=FATES,
    )
    def acquire(
        self,
        data: st.DataObject,
        form: int,
        first: int,
        count: int,
        pin: bool,
        prefix: bool,
        near: int,
        fate: str,
    ) -> None:
        client = self._clients(data)
        if client is not None:
            packed = b"".join(key(form * 1000 + first + at) for at in range(count))
                self._send(client, protocol.Acquire(packed, layout(form), pin, prefix, near), fate)

    def _booked_acquire(
        self, client: Client, late: Late, reply: protocol.Acquired, heard: bool
    ) -> None:
        ask = late.ask
        assert isinstance(ask, protocol.Acquire)
        numbers = [int.from_bytes(each, "big") for each in protocol.split_keys(ask.keys)]
        there = [bool(self._unexpired(number)) for number in numbers]
        found = places(protocol.unpack(reply.extents, EXTENT))
        if ask.prefix:
            hits = numbers[: len(found)]
            most = ([*there, False]).index(False)
        else:
            hits = [number for number, flag in zip(numbers, reply.flags, strict=True) if flag]
            most = sum(there)
        assert len(hits) == len(found) <= most
        if not ask.pin or self.policy.pinned_bytes_max > 4 * MIB:
            assert len(found) == most
        read: dict[Handle, Chunk] = {}
        for number, place in zip(hits, found, strict=True):
            chunk = self.bound[number][place.handle]
            assert chunk.place == place and chunk in self._unexpired(number)
            assert self.memory.holds(place, chunk.stamp)
            read[place.handle] = chunk
        if heard and read and ask.pin:
            client.pins[late.rid] = read
        elif heard and read:
            client.leases[late.rid] = self.now_ns + reply.lease_ms * MS, read

    def _unexpired(self, number: int) -> list[Chunk]:
        chunks = self.bound.get(number, {}).values()
        return [chunk for chunk in chunks if not 0 < chunk.expiry_ns <= self.now_ns]

    @rule(data=st.data())
    def read_under_a_lease(self, data: st.DataObject) -> None:
        """However late: what the fence lets pass is what was committed."""
        client = self._clients(data, lambda each: each.leases)
        if client is None:
            return
        ends_ns, held = client.leases[data.draw(st.sampled_from(sorted(client.leases)))]
        columns = list(zip(*held, strict=True))
        same = self.reader.unchanged(protocol.np.array(columns[0]), protocol.np.array(columns[1]))
        for chunk, intact in zip(held.values(), same.tolist(), strict=True):
            if intact:
                assert chunk.place.segment in self.segments, "the fence of a segment that has gone holds"
                assert self.memory.holds(chunk.place, chunk.stamp), "the fence let other bytes pass"
            elif self.now_ns < ends_ns:
                assert not any(chunk in replicas.values() for replicas in self.bound.values())

    @rule(data=st.data(), whole=st.booleans(), fate=FATES)
    def release(self, data: st.DataObject, whole: bool, fate: str) -> None:
        client = self._clients(data, lambda each: each.pins or each.leases)
        if client is None:
            return
        rid = data.draw(st.sampled_from([*client.pins, *client.leases]))
        if rid in client.leases:
            del client.leases[rid]
            self._send(client, protocol.Release(rid), fate)
            return
        held = client.pins.pop(rid)
        part = list(held) if whole else list(held)[::2]
        rest = {handle: chunk for handle, chunk in held.items() if handle not in part}
        if rest:
            client.pins[rid] = rest
        packed = protocol.pack_handles([index for index, _ in part], [gen for _, gen in part])
        self._send(client, protocol.Release(rid, b"" if whole else packed), fate)

    @rule(data=st.data(), form=FORMS, first=st.integers(0, 40), count=st.integers(1, 30))
    def look_up(self, data: st.DataObject, form: int, first: int, count: int) -> None:
        client = self._clients(data)
        if client is None:
            return
        numbers = [form * 1000 + first + at for at in range(count)]
        packed = b"".join(map(key, numbers))
        now_ns = self._tick()
        flags = bytes(bool(self._unexpired(number)) for number in numbers)
        self._learn_expiries()
        prefix = (flags + b"\0").index(0)
        asks = (
            (protocol.Lookup(packed, layout(form), True), protocol.Found(prefix, flags)),
            (protocol.Lookup(packed, layout(form)), protocol.Found(prefix)),
            (protocol.Lookup(packed, layout(9)), protocol.Found(0)),
            (protocol.Contains(packed), protocol.Found(prefix, flags)),
        )
        for ask, wanted in asks:
            assert self.directory.handle(client.session, client.next_rid(), ask, now_ns) == wanted

    # -- the rest

    @rule(data=st.data(), form=FORMS, first=st.integers(0, 40), count=st.integers(1, 30))
    def touch(self, data: st.DataObject, form: int, first: int, count: int) -> None:
        client = self._clients(data)
        if client is not None:
                packed = b"".join(key(form * 1000 + first + at) for at in range(count))
            self._send(client, protocol.Touch(packed), "answered")

    @rule(data=st.data(), form=FORMS, first=st.integers(0, 40), count=st.integers(1, 30), fate=FATES)
    def remove(self, data: st.DataObject, form: int, first: int, count: int, fate: str) -> None:
        client = self._clients(data)
        if client is not None:
                packed = b"".join(key(form * 1000 + first + at) for at in range(count))
            self._send(client, protocol.Remove(packed), fate)

    @rule(data=st.data(), space=st.integers(0, 2), fate=FATES)
    def clear(self, data: st.DataObject, space: int, fate: str) -> None:
        client = self._clients(data)
        if client is not None:
                self._send(client, protocol.Clear(namespace(space) if space else b""), fate)

    def _booked_removal(
        self, client: Client, late: Late, reply: protocol.Done, heard: bool
    ) -> None:
        if isinstance(late.ask, protocol.Remove):
            gone = {int.from_bytes(each, "big") for each in protocol.split_keys(late.ask.keys)}
        else:
            assert isinstance(late.ask, protocol.Clear)
            space = int.from_bytes(late.ask.namespace, "big")
            gone = {
                number for number in self.bound if not space or self._first(number) in (space, None)
            }
        for number in gone:
            self.bound.pop(number, None)

    def _first(self, number: int) -> int | None:
        """The namespace of the key's first replica, which is the one that counts."""
        spaces = {chunk.space for chunk in self.bound[number].values()}
        if len(spaces) == 1:
            return spaces.pop()
        return None if key(number) not in self.directory.chunks else -1

    @rule(data=st.data(), reply_lost=st.booleans())
    def declare(self, data: st.DataObject, reply_lost: bool) -> None:
        client = self._clients(data)
        if client is not None:
            self._declare(client)

    def _declare(self, client: Client) -> None:
        held = dict(client.reserved)
        for late in client.under_way:
            if not late.given_up:
                held |= late.hanging
        ask = protocol.Declare(
            client.truth(),
            protocol.pack_handles([index for index, _ in held], [gen for _, gen in held]),
            [
                protocol.Right(rid, protocol.pack_handles([i for i, _ in pins], [g for _, g in pins]))
                for rid, pins in client.pins.items()
            ],
        )
        self._send(client, ask, "answered")
        client.settled = max(client.settled, ask.settled)

    @rule(ms=st.sampled_from((1, 400, 1_000, LEASE_MS, 6_000)))
    def time_passes(self, ms: int) -> None:
        self.now_ns += ms * MS
        self.directory.tick(self.now_ns)

    # -- what always holds

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

    @invariant()
    def nothing_was_lost_or_changed(self) -> None:
        if not hasattr(self, "requests"):
            return
        self.directory.tick(self.now_ns)
        self.directory.check()
        self._learn_evictions(set())
        for client in self.clients.values():
            for place, stamp in client.reserved.values():
                assert self.memory.holds(place, stamp), "somebody wrote to a reservation"
            for chunk in client.pinned():
                assert self.memory.holds(chunk.place, chunk.stamp), "somebody wrote to a pinned chunk"

    def teardown(self) -> None:
        if not hasattr(self, "requests"):
            return
        for client in self.clients.values():
            if not client.connected:
                self._hello(client)
            client.under_way.clear()
            client.reserved.clear()
            client.pins.clear()
            self._declare(client)
        self.now_ns += LEASE_MS * MS
        self.directory.tick(self.now_ns)
        gauges = self.directory.gauges()
        assert (gauges["reservations"], gauges["pins"], gauges["leases"]) == (0, 0, 0)
        session = next(iter(self.clients), 1)
        self.directory.handle(session, 1 << 40, protocol.Clear(), self.now_ns)
        self.directory.check()
        assert self.directory.gauges()["used_bytes"] == 0, "something leaks"
        left = {self.table.state(index) for index in self.table.in_use().tolist()}
        assert left <= {State.FREE, State.EMPTY}
        del self.requests
        self.table.close()
        self.path.unlink()


class S3FIFOPoolMachine(PoolMachine):
    """The same with the other policy."""

    eviction = "s3fifo"


TestPoolLRU = PoolMachine.TestCase
TestPoolS3FIFO = S3FIFOPoolMachine.TestCase
TestPoolLRU.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestPoolS3FIFO.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
