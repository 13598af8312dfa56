"""Chunks that somebody wants forgotten."""

from __future__ import annotations

from random import Random

from tests.support.machine.clients import FATES, Clients
from tests.support.model import Late
from tests.support.pool import key, namespace
from vcache import protocol


class Forgetting(Clients):
    """Removal by key and by model."""

    def __init__(self) -> None:
        super().__init__()
        self.booked |= {
            protocol.Remove: self._booked_removal,
            protocol.Clear: self._booked_removal,
        }

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
