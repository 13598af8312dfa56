"""Whatever clients do, lose and die of, whenever the server is killed: bytes found are the bytes stored."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

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

FORMS = (1, 1, 1, 2, 3, 4)
LEASE_MS = 2_000
DICE = st.randoms(use_true_random=True)
"""Seeds, not choices of Hypothesis's own: a hundred times as many events in the same time."""

FIRST = (0, 0, 0, 4, 20, 40, 100)
FATES = ("answered",) * 5 + ("lost", "not there yet", "answered late")

TRAFFIC = (
    *("store",) * 5,
    *("reserve", "commit", "acquire") * 4,
    *("read_under_a_lease", "release", "abort", "declare") * 2,
    *("something_late_arrives", "client_gives_up", "request_is_sent_again", "a_stopped_writer_wakes_up"),
    *("look_up", "touch", "remove"),
    *("ask_for_offers", "copy_ends") * 4,
    *("client_comes_back",) * 4,
)
UPHEAVALS = (
    *("server_is_killed", "time_passes") * 3,
    *("new_session", "session_dies", "add_segment", "add_segment", "drop_segment", "clear"),
)


class PoolMachine(RuleBasedStateMachine):
    """Clients of one pool. Each rule is one event; `_booked_...` and the invariant say what is allowed."""

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
        self.copies: dict[tuple[int, Handle], Handle] = {}
        self.sessions = 0
        self.attached = 0
        self.epoch = 1

    @initialize(dice=DICE, small_quota=st.booleans())
    def start(self, dice: Random, small_quota: bool) -> None:
        self.policy = Policy(
            eviction=self.eviction,  # type: ignore[arg-type]
            default_ttl_ms=dice.choice((0, 0, 5_000)),
            lease_ms=LEASE_MS,
            pinned_bytes_max=300 * KIB if small_quota else 8 * MIB,
        )
        self.table = ExtentTable.create(self.path, dice.choice((90, 2048, 2048)), boot=BOOT)
        self.reader = TableReader(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        self._serve(Directory(self.table, self.policy))
        for _ in range(2):
            self._begin_session()
        self._add_segment(self.clients[1], MIB, 0)
        if dice.random() < 0.6:
            self._add_segment(self.clients[2], MIB, 1)
            self._send(self.clients[1], protocol.Offers(False, 16), "answered")
        if dice.random() < 0.5:
            self._store(self.clients[1], 1, 0, 60)

    @rule(dice=DICE, many=st.sampled_from((1, 3, 10, 30)))
    def traffic(self, dice: Random, many: int) -> None:
        self._happen(dice, TRAFFIC, many)

    @rule(dice=DICE, many=st.sampled_from((10, 30)))
    def more_traffic(self, dice: Random, many: int) -> None:
        """Hypothesis chooses among rules: so most of what happens is traffic."""
        self._happen(dice, TRAFFIC, many)

    @rule(dice=DICE)
    def upheaval(self, dice: Random) -> None:
        self._happen(dice, UPHEAVALS, 1)

    def _happen(self, dice: Random, events: tuple[str, ...], many: int) -> None:
        for _ in range(many):
            if self.clients:
                self.event = dice.choice(events)
                getattr(self, self.event)(dice)
                self.nothing_was_lost_or_changed()

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

    # -- who there is

    def _clients(self, dice: Random, wanted: Callable[[Client], object] = lambda each: True) -> Client | None:
        there = [each for each in self.clients.values() if each.connected and wanted(each)]
        return dice.choice(there) if there else None

    def new_session(self, dice: Random) -> None:
        if len(self.clients) < 4:
            self._begin_session()

    def _begin_session(self) -> None:
        self.sessions += 1
        self.clients[self.sessions] = Client(self.sessions, self.sessions.to_bytes(TOKEN_BYTES, "big"))
        self._hello(self.clients[self.sessions])

    def _hello(self, client: Client) -> None:
        self.requests.sessions[client.session] = Credentials(client.token)
        self.directory.rights.of(client.session)
        client.connected = True

    def session_dies(self, dice: Random) -> None:
        if len(self.clients) > 1:
            self._die(dice.choice(sorted(self.clients)))

    def _die(self, session: int) -> None:
        del self.clients[session]
        self.requests.sessions.pop(session, None)
        self.directory.end_session(session)
        for number in [number for number, (lender, _) in self.lenders.items() if lender == session]:
            self._drop(number)

    def add_segment(self, dice: Random) -> None:
        client = self._clients(dice)
        if client is not None and len(self.segments) < 3:
            size = dice.choice((MIB // 2, MIB, 3 * MIB))
            self._add_segment(client, size, dice.choice((0, 0, 1)))

    def _add_segment(self, client: Client, size: int, rank: int) -> None:
        self.attached += 1
        asked = attach(self.attached, size, rank=rank)
        number = self.directory.add_segment(client.session, asked)
        assert number not in self.segments
        self.segments[number] = asked.size
        self.lenders[number] = client.session, asked
        self.memory.add(number, asked.size)

    def drop_segment(self, dice: Random) -> None:
        if self.segments:
            self._drop(dice.choice(sorted(self.segments)))

    def _drop(self, number: int) -> None:
        self.directory.drop_segment(number)
        del self.segments[number], self.lenders[number]
        for client in self.clients.values():
            client.forget_segment(number)
        for replicas in self.bound.values():
            for handle in [handle for handle, chunk in replicas.items() if chunk.place.segment == number]:
                del replicas[handle]

    # -- the server's end and its successor's beginning

    def server_is_killed(self, dice: Random) -> None:
        lives = (True, True, False)
        alive = {session for session in sorted(self.clients) if dice.choice(lives)}
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

    def client_comes_back(self, dice: Random) -> None:
        away = [client for client in self.clients.values() if not client.connected]
        if not away:
            return
        client = dice.choice(away)
        client.token = (client.session << 64 | self.epoch).to_bytes(TOKEN_BYTES, "big")
        self._hello(client)
        for number, (lender, asked) in self.lenders.items():
            if lender == client.session:
                assert self.directory.add_segment(client.session, asked) == number
        if dice.random() < 0.5:
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
        booked = {
            protocol.Reserve: self._booked_reserve,
            protocol.Commit: self._booked_commit,
            protocol.Abort: self._booked_abort,
            protocol.Acquire: self._booked_acquire,
            protocol.Offers: self._booked_offers,
            protocol.Moved: self._booked_moved,
            protocol.Remove: self._booked_removal,
            protocol.Clear: self._booked_removal,
        }.get(type(late.ask))
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

    def something_late_arrives(self, dice: Random) -> None:
        client = self._clients(dice, lambda each: each.under_way)
        if client is not None:
            late = dice.choice(client.under_way)
            if late.done:
                self._hear(client, late)
            else:
                self._arrive(client, late)

    def client_gives_up(self, dice: Random) -> None:
        client = self._clients(dice, lambda each: each.under_way)
        if client is not None:
            dice.choice(client.under_way).given_up = True

    def request_is_sent_again(self, dice: Random) -> None:
        client = self._clients(dice, lambda each: each.answered)
        if client is not None:
            frame, answer = client.answered[dice.choice(sorted(client.answered))]
            ask = protocol.decode_request(protocol.decode_envelope(frame).body)
            if isinstance(ask, protocol.Reserve | protocol.Commit | protocol.Acquire | protocol.Remove):
                assert self.requests.answer([frame], self._tick()) == answer

    def _tick(self) -> int:
        self.now_ns += 1_000
        return self.now_ns

    # -- writing

    def reserve(self, dice: Random) -> None:
        form = dice.choice(FORMS)
        first = dice.choice(FIRST)
        count = dice.choice((1, 3, 8, 40))
        keyed = dice.random() < 0.5
        near = dice.randint(0, 3)
        fate = dice.choice(FATES)
        patient = dice.random() < 0.3
        client = self._clients(dice)
        if client is None:
            return
        numbers = range(form * 1000 + first, form * 1000 + first + count) if keyed else ()
        self._reserve(client, form, numbers, count, near, fate, patient)

    def _reserve(
        self,
        client: Client,
        form: int,
        numbers: range | tuple[()],
        count: int,
        near: int,
        fate: str,
        patient: bool = False,
    ) -> None:
        packed = b"".join(map(key, numbers))
        self._send(client, protocol.Reserve(layout(form), SIZES[form], packed, count, near, patient), fate)

    def _booked_reserve(self, late: Late, reply: protocol.Reserved) -> None:
        ask = late.ask
        assert isinstance(ask, protocol.Reserve)
        numbers = [int.from_bytes(each, "big") for each in protocol.split_keys(ask.keys)]
        for number, flag in zip(numbers, reply.present, strict=True):
            assert bool(self.bound.get(number)) >= bool(flag), f"key {number} is said to be there"
        assert reply.wanted == (reply.present.count(0) if numbers else ask.count)
        granted = places(protocol.unpack(reply.extents, EXTENT))
        assert len(granted) <= reply.wanted
        flags = list(zip(numbers, reply.present, strict=True))
        self._learn_evictions(kept={number for number, flag in flags if flag})
        assert all(bool(self.bound.get(number)) == bool(flag) for number, flag in flags)
        for place in granted:
            self._check_grant(place, ask.size)
        late.reserved = {place.handle: (place, 0) for place in granted}
        if reply.coming:
            assert ask.patient and not granted
        elif len(granted) < reply.wanted and not self.directory.allocator.table_full:
            self._check_full(extent_size(ask.size), {n for n in numbers if self.bound.get(n)})

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

    def _check_full(self, size: int, kept: set[int]) -> None:
        """Less was granted than asked: nothing of this size could have been given up."""
        for number, replicas in self.bound.items():
            for index, _ in replicas:
                same_size = int(self.table.records["size"][index]) == size
                assert not same_size or number in kept or self.directory.rights.held(index), (
                    f"extent {index} of key {number} could have been given up"
                )

    def a_stopped_writer_wakes_up(self, dice: Random) -> None:
        """What it still owns it may write to, whatever happened meanwhile."""
        if self.clients:
            client = dice.choice(list(self.clients.values()))
            for place, stamp in client.reserved.values():
                self.memory.write(place, stamp)

    def commit(self, dice: Random) -> None:
        count = dice.choice((1, 8, 40))
        first = dice.choice(FIRST)
        ttl_ms = dice.choice((-1, -1, 0, 500))
        replica = dice.random() < 0.5
        space = dice.randint(1, 2)
        fate = dice.choice(FATES)
        client = self._clients(dice, lambda each: each.reserved)
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

    def _booked_commit(self, late: Late, reply: protocol.Committed) -> None:
        ask = late.ask
        assert isinstance(ask, protocol.Commit)
        named = protocol.unpack(ask.handles, protocol.HANDLE).tolist()
        numbers = [int.from_bytes(each, "big") for each in protocol.split_keys(ask.keys)]
        sizes = protocol.unpack(ask.lengths, np.dtype("<u8")).tolist()
        ttl_ms = self.policy.default_ttl_ms if ask.ttl_ms < 0 else ask.ttl_ms
        for at in reversed(range(len(named))):
            handle, number, outcome = named[at], numbers[at], reply.outcomes[at]
            place, stamp = late.hanging.get(handle, (None, 0))
            if place is None or outcome == Outcome.STALE:
                assert place is None or late.given_up, f"{place} was this session's"
                assert outcome == Outcome.STALE
            elif outcome == Outcome.LOST:
                assert self.bound.get(number), f"key {number} has no other copy"
                late.reserved[handle] = place, stamp
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

    def store(self, dice: Random) -> None:
        """What engines do all day: fills the pool."""
        form = dice.choice(FORMS)
        first = dice.choice(FIRST)
        count = dice.choice((4, 20, 60))
        patient = dice.random() < 0.6
        client = self._clients(dice)
        if client is not None:
            self._store(client, form, first, count, patient)

    def _store(self, client: Client, form: int, first: int, count: int, patient: bool = False) -> None:
        before = set(client.reserved)
        numbers = range(form * 1000 + first, form * 1000 + first + count)
        self._reserve(client, form, numbers, 0, 0, "answered", patient)
        fresh = {handle: client.reserved.pop(handle) for handle in set(client.reserved) - before}
        client.reserved = fresh | client.reserved
        if fresh:
            self._commit(client, first, len(fresh), -1, False, 1, "answered")

    def abort(self, dice: Random) -> None:
        count = dice.randint(1, 10)
        fate = dice.choice(FATES)
        client = self._clients(dice, lambda each: each.reserved)
        if client is None:
            return
        held = [place for place, _ in client.reserved.values()][:count]
        packed = protocol.pack_handles([p.index for p in held], [p.generation for p in held])
        for place in held:  # nothing of the caller touches them again
            del client.reserved[place.handle]
        self._send(client, protocol.Abort(packed), fate)

    def _booked_abort(self, late: Late, reply: protocol.Done) -> None:
        assert isinstance(late.ask, protocol.Abort)
        assert reply.count <= len(late.ask.handles) // 8

    # -- reading

    def acquire(self, dice: Random) -> None:
        form, first = self._likely(dice)
        count = dice.choice((1, 4, 30))
        pin, prefix = dice.random() < 0.4, dice.random() < 0.5
        near = dice.randint(0, 3)
        fate = dice.choice(FATES)
        client = self._clients(dice)
        if client is not None:
            packed = b"".join(key(form * 1000 + first + at) for at in range(count))
            self._send(client, protocol.Acquire(packed, layout(form), pin, prefix, near), fate)

    def _likely(self, dice: Random) -> tuple[int, int]:
        """A key that is mostly there, as form and number."""
        there = [number for number, replicas in self.bound.items() if replicas]
        if there and dice.random() < 0.8:
            form, first = divmod(dice.choice(there), 1000)
            return form, first
        return dice.choice(FORMS), dice.choice(FIRST)

    def _booked_acquire(self, late: Late, reply: protocol.Acquired) -> None:
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
        if ask.pin:
            late.pinned = read
        elif read:
            late.leased = self.now_ns + reply.lease_ms * MS, read

    def _unexpired(self, number: int) -> list[Chunk]:
        chunks = self.bound.get(number, {}).values()
        return [chunk for chunk in chunks if not 0 < chunk.expiry_ns <= self.now_ns]

    def read_under_a_lease(self, dice: Random) -> None:
        """However late: what the fence lets pass is what was committed."""
        client = self._clients(dice, lambda each: each.leases)
        if client is None:
            return
        ends_ns, held = client.leases[dice.choice(sorted(client.leases))]
        columns = list(zip(*held, strict=True))
        same = self.reader.unchanged(np.array(columns[0]), np.array(columns[1]))
        for chunk, intact in zip(held.values(), same.tolist(), strict=True):
            if intact:
                assert chunk.place.segment in self.segments, "the fence of a segment that has gone holds"
                assert self.memory.holds(chunk.place, chunk.stamp), "the fence let other bytes pass"
            elif self.now_ns < ends_ns:
                assert not any(chunk in replicas.values() for replicas in self.bound.values())

    def release(self, dice: Random) -> None:
        whole = dice.random() < 0.5
        fate = dice.choice(FATES)
        client = self._clients(dice, lambda each: each.pins or each.leases)
        if client is None:
            return
        rid = dice.choice([*client.pins, *client.leases])
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

    def look_up(self, dice: Random) -> None:
        form, first = self._likely(dice)
        count = dice.randint(1, 30)
        client = self._clients(dice)
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

    # -- copying for the pool

    def ask_for_offers(self, dice: Random) -> None:
        below, limit = dice.random() < 0.3, dice.choice((0, 1, 4, 16, 16, 16))
        fate = dice.choice(FATES)
        lenders = {lender for lender, _ in self.lenders.values()}
        client = self._clients(dice, lambda each: below or each.session in lenders)
        if client is not None:
            self._send(client, protocol.Offers(below, limit), fate)

    def _booked_offers(self, late: Late, reply: protocol.Offered) -> None:
        ask = late.ask
        assert isinstance(ask, protocol.Offers)
        numbers = [int.from_bytes(each, "big") for each in protocol.split_keys(reply.keys)]
        sources = places(protocol.unpack(reply.sources, EXTENT))
        targets = places(protocol.unpack(reply.targets, EXTENT))
        self._learn_evictions(kept=set(numbers))
        assert len(sources) == len(numbers) <= ask.limit
        assert len(targets) == (0 if ask.below else len(sources))
        for number, source in zip(numbers, sources, strict=True):
            assert self.bound[number][source.handle].place == source
        for source, target in zip(sources, targets, strict=False):
            self._check_grant(target, target.length)
            assert target.length >= source.length and target.segment != source.segment
        chunks = [self.bound[n][s.handle] for n, s in zip(numbers, sources, strict=True)]
        late.pinned = {chunk.place.handle: chunk for chunk in chunks}
        # Who hears of it writes there at once what it is to copy; `copy_ends` says so, or that it failed.
        late.reserved = {target.handle: (target, 0) for target in targets}
        for source, target in zip(sources, targets, strict=False):
            self.copies[late.rid, source.handle] = target.handle

    def copy_ends(self, dice: Random) -> None:
        """Of a copy between segments, or to below; done, or given up."""
        done, fate, pick = dice.random() < 0.8, dice.choice(FATES), dice.random()
        client = self._clients(dice, lambda each: each.pins)
        if client is None:
            return
        ours = [(rid, source) for rid, held in client.pins.items() for source in held]
        copies = [each for each in ours if each in self.copies]
        ours = copies or ours
        rid, source = ours[int(pick * len(ours))]
        held = client.pins[rid]
        target = self.copies.get((rid, source))
        if target is not None and target not in client.reserved:
            return  # it did something else with it meanwhile
        hanging: tuple[Handle, ...] = () if target is None else (target,)
        if target is not None:
            place, _ = client.reserved[target]
            stamp = held[source].stamp
            self.memory.write(place, stamp)
            client.reserved[target] = place, stamp
        del held[source]
        if not held:
            del client.pins[rid]
        packed = [protocol.pack_handles([each[0]], [each[1]]) for each in (source, *hanging)]
        ask = protocol.Moved(rid, packed[0], packed[1] if hanging else b"", done)
        self._send(client, ask, fate, hanging)

    def _booked_moved(self, late: Late, reply: protocol.Done) -> None:
        ask = late.ask
        assert isinstance(ask, protocol.Moved)
        self._learn_expiries()
        handle = tuple(protocol.unpack(ask.source, protocol.HANDLE).tolist()[0])
        found = [(number, each[handle]) for number, each in self.bound.items() if handle in each]
        if not reply.count or not late.hanging:
            assert not reply.count or found, "a chunk that has gone was taken for copied"
            return
        ((number, source),) = found
        ((target, (place, stamp)),) = late.hanging.items()
        assert ask.done and self.memory.holds(place, stamp) and stamp == source.stamp
        assert all(each.place.segment != place.segment for each in self.bound[number].values())
        copy = Place(place.index, place.generation, place.segment, place.offset, source.place.length)
        expiry_ns = -(-source.expiry_ns // NS) * NS
        self.bound[number][target] = Chunk(copy, stamp, source.form, source.space, expiry_ns)

    # -- the rest

    def touch(self, dice: Random) -> None:
        form, first = self._likely(dice)
        count = dice.randint(1, 30)
        client = self._clients(dice)
        if client is not None:
            packed = b"".join(key(form * 1000 + first + at) for at in range(count))
            self._send(client, protocol.Touch(packed), "answered")

    def remove(self, dice: Random) -> None:
        form, first = self._likely(dice)
        count = dice.randint(1, 30)
        fate = dice.choice(FATES)
        client = self._clients(dice)
        if client is not None:
            packed = b"".join(key(form * 1000 + first + at) for at in range(count))
            self._send(client, protocol.Remove(packed), fate)

    def clear(self, dice: Random) -> None:
        space = dice.randint(0, 2)
        fate = dice.choice(FATES)
        client = self._clients(dice)
        if client is not None:
            self._send(client, protocol.Clear(namespace(space) if space else b""), fate)

    def _booked_removal(self, late: Late, reply: protocol.Done) -> None:
        if isinstance(late.ask, protocol.Remove):
            gone = {int.from_bytes(each, "big") for each in protocol.split_keys(late.ask.keys)}
        else:
            assert isinstance(late.ask, protocol.Clear)
            space = int.from_bytes(late.ask.namespace, "big")
            gone = {number for number in self.bound if not space or self._first(number) in (space, None)}
        for number in gone:
            self.bound.pop(number, None)

    def _first(self, number: int) -> int | None:
        """The namespace of the key's first replica, which is the one that counts."""
        spaces = {chunk.space for chunk in self.bound[number].values()}
        if len(spaces) == 1:
            return spaces.pop()
        return None if key(number) not in self.directory.chunks else -1

    def declare(self, dice: Random) -> None:
        client = self._clients(dice)
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

    def time_passes(self, dice: Random) -> None:
        self.now_ns += dice.choice((1, 400, 1_000, LEASE_MS, 6_000)) * MS
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
        try:
            self._leave_nothing()
        finally:
            del self.requests
            self.table.close()
            self.path.unlink()

    def _leave_nothing(self) -> None:
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


class S3FIFOPoolMachine(PoolMachine):
    """The same with the other policy."""

    eviction = "s3fifo"


TestPoolLRU = PoolMachine.TestCase
TestPoolS3FIFO = S3FIFOPoolMachine.TestCase
_EXAMPLES = settings.default.max_examples  # 100, and many more in the profile "explore"
TestPoolLRU.settings = settings(max_examples=_EXAMPLES // 4, stateful_step_count=20)
TestPoolS3FIFO.settings = settings(max_examples=_EXAMPLES // 8, stateful_step_count=20)
