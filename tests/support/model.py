"""What a pool may do, seen from outside: clients, their memory, and who may find, read and write what.

The model knows what every client knows, and the bytes: `Memory` holds for each 4 KiB of a segment the stamp
of who wrote it last. It never predicts which chunk is evicted; it learns that from the directory, and checks
that it was allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vcache.limits import EXTENT_ALIGN_BYTES
from vcache.protocol import Extents, Request

Handle = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """An extent as it was granted; length in bytes is that of the extent or of the chunk in it."""

    index: int
    generation: int
    segment: int
    offset: int
    length: int

    @property
    def handle(self) -> Handle:
        return self.index, self.generation

    @property
    def granules(self) -> slice:
        first = self.offset // EXTENT_ALIGN_BYTES
        return slice(first, first - (-self.length // EXTENT_ALIGN_BYTES))


def places(extents: Extents) -> list[Place]:
    """Extents off the wire."""
    names = ("index", "generation", "segment", "offset", "length")
    return [Place(*row) for row in zip(*(extents[name].tolist() for name in names), strict=True)]


@dataclass(frozen=True)
class Chunk:
    """A committed replica: what a reader of its key must find."""

    place: Place
    stamp: int
    form: int
    space: int
    expiry_ns: int


@dataclass
class Late:
    """A request that is under way, or its answer; its client may have given it up.

    hanging: reservations, as in `Client.reserved`, whose fate its answer decides. What the answer gives, once
    the server has made it: reserved, pinned, leased.
    """

    rid: int
    frame: bytes
    ask: Request
    hanging: dict[Handle, tuple[Place, int]]
    given_up: bool = False
    done: bool = False
    reserved: dict[Handle, tuple[Place, int]] = field(default_factory=dict)
    pinned: dict[Handle, Chunk] = field(default_factory=dict)
    leased: tuple[int, dict[Handle, Chunk]] | None = None

    def forget_segment(self, segment: int) -> None:
        """The segment has gone."""
        for held in (self.hanging, self.reserved):
            for handle in [handle for handle, (place, _) in held.items() if place.segment == segment]:
                del held[handle]
        self.pinned = {h: chunk for h, chunk in self.pinned.items() if chunk.place.segment != segment}


@dataclass
class Client:
    """What one session knows: its reservations with what it wrote there, and what it may read."""

    session: int
    token: bytes
    rid: int = 0
    settled: int = 0
    connected: bool = True
    reserved: dict[Handle, tuple[Place, int]] = field(default_factory=dict)
    pins: dict[int, dict[Handle, Chunk]] = field(default_factory=dict)
    leases: dict[int, tuple[int, dict[Handle, Chunk]]] = field(default_factory=dict)
    under_way: list[Late] = field(default_factory=list)
    answered: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)

    def next_rid(self) -> int:
        self.rid += 1
        return self.rid

    def truth(self) -> int:
        """The request up to which this client's books are the whole truth."""
        waiting = [late.rid for late in self.under_way if not late.given_up]
        return min(waiting, default=self.rid + 1) - 1

    def pinned(self) -> Iterator[Chunk]:
        """What it has pinned, or will know of when the answer is there."""
        for held in (*self.pins.values(), *(late.pinned for late in self.under_way if not late.given_up)):
            yield from held.values()

    def writable(self) -> Iterator[Place]:
        """What it may write to, or will know of when the answer is there."""
        for place, _ in self.reserved.values():
            yield place
        for late in self.under_way:
            if not late.given_up:
                for place, _ in (late.reserved if late.done else late.hanging).values():
                    yield place

    def forget_segment(self, segment: int) -> None:
        """The segment has gone: nothing of it is ours any more, and nothing of it is read."""
        self.reserved = {h: each for h, each in self.reserved.items() if each[0].segment != segment}
        for rid, held in list(self.pins.items()):
            self.pins[rid] = {h: chunk for h, chunk in held.items() if chunk.place.segment != segment}
            if not self.pins[rid]:
                del self.pins[rid]
        for late in self.under_way:
            late.forget_segment(segment)


class Memory:
    """The bytes of all segments, a stamp for each 4 KiB."""

    def __init__(self) -> None:
        self._stamps: dict[int, NDArray[np.int64]] = {}
        self._last = 0

    def add(self, segment: int, nbytes: int) -> None:
        self._stamps[segment] = np.zeros(nbytes // EXTENT_ALIGN_BYTES, np.int64)

    def new_stamp(self) -> int:
        self._last += 1
        return self._last

    def write(self, place: Place, stamp: int) -> None:
        stamps = self._stamps[place.segment][place.granules]
        assert len(stamps) == -(-place.length // EXTENT_ALIGN_BYTES), f"{place} leaves its segment"
        stamps[:] = stamp

    def holds(self, place: Place, stamp: int) -> bool:
        return bool((self._stamps[place.segment][place.granules] == stamp).all())


def overlap(place: Place, others: Iterable[Place]) -> list[Place]:
    """Those of the others that share bytes with `place`."""
    return [
        other
        for other in others
        if other.segment == place.segment
        and other.offset < place.offset + place.length
        and place.offset < other.offset + other.length
    ]
