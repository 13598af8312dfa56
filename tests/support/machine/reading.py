"""What readers do, and that they find what was stored."""

from __future__ import annotations

from random import Random

import numpy as np

from tests.support.machine.clients import FATES, Clients
from tests.support.model import Chunk, Handle, Late, places
from tests.support.pool import MS, key, layout
from vcache import protocol
from vcache.limits import MIB
from vcache.protocol import EXTENT


class Reading(Clients):
    """Leases and pins; lookups."""

    def __init__(self) -> None:
        super().__init__()
        self.booked |= {
            protocol.Acquire: self._booked_acquire,
        }

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

    def touch(self, dice: Random) -> None:
        form, first = self._likely(dice)
        count = dice.randint(1, 30)
        client = self._clients(dice)
        if client is not None:
            packed = b"".join(key(form * 1000 + first + at) for at in range(count))
            self._send(client, protocol.Touch(packed), "answered")
