"""What writers do, and what the directory may grant them."""

from __future__ import annotations

from random import Random

import numpy as np

from metadata_server.allocator import extent_size
from tests.support.machine.clients import FATES, FIRST, FORMS, SIZES, Clients
from tests.support.model import Chunk, Client, Late, Place, places
from tests.support.pool import MS, key, layout, lengths, namespace
from vcache import protocol
from vcache.protocol import EXTENT, Outcome


class Writing(Clients):
    """Reservations: granted, committed, given up."""

    def __init__(self) -> None:
        super().__init__()
        self.booked |= {
            protocol.Reserve: self._booked_reserve,
            protocol.Commit: self._booked_commit,
            protocol.Abort: self._booked_abort,
        }

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
