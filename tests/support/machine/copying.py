"""Copies that the pool wants made of its chunks, and what becomes of them."""

from __future__ import annotations

from random import Random

from metadata_server.directory import NS
from tests.support.machine.clients import FATES, Clients
from tests.support.model import Chunk, Handle, Late, Place, places
from vcache import protocol
from vcache.protocol import EXTENT


class Copying(Clients):
    """Offers, and how the copies end."""

    def __init__(self) -> None:
        super().__init__()
        self.booked |= {
            protocol.Offers: self._booked_offers,
            protocol.Moved: self._booked_moved,
        }

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
