"""In which order committed extents are given up when a pool is full.

A policy orders the extents of one size and nothing else: it allocates nothing, holds no bytes and has no
clock. The directory tells it what became committed, was used or left, and asks it for extents to give up only
when there is no free one, so that its length at that moment is the pool's capacity. What must not be given up
now (pinned, say) is the directory's to know: it passes a predicate, and such extents keep their place.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from itertools import filterfalse, islice
from typing import Final, Literal, Protocol

from vcache.errors import ArgumentError

PolicyName = Literal["lru", "s3fifo"]

SMALL_SHARE: Final = 10
"""S3-FIFO's small queue keeps 1/10 of the capacity: the paper's value, near the best in all of its traces."""

TOUCHES_MAX: Final = 3
"""S3-FIFO counts up to 3 touches, the paper's two bits: bounds how often eviction passes over an extent."""

GHOST_KEY_BYTES: Final = 8
"""S3-FIFO's ghost remembers 8 bytes of a key, for memory: keys are digests, so that even among 2**20 of them
a false match is rarer than one in a million, and all that it does is to give one extent a better place."""

GHOST_ORDER: Final = 2
"""The ghost's order may be twice as long as what it remembers: bounds the entries of keys that were taken."""

PEEK_SHARE: Final = 8
PEEK_MORE: Final = 512
"""How many extents S3-FIFO looks at for each that it is to name, and besides: bounds what a reserve costs."""

_OUT: Final = 255
"""In place of its touches: the extent is not in the policy. More than TOUCHES_MAX, so never touched."""


class EvictionPolicy(Protocol):
    """The order in which the committed extents of one size are given up."""

    def insert(self, extent: int, key: bytes) -> None:
        """Add an extent that became committed and is not in the policy; its key tells if a chunk returns."""

    def touch(self, extents: Sequence[int]) -> None:
        """Note that these were used, the last one most recently; those not in the policy are ignored."""

    def refresh(self, extents: Sequence[int]) -> None:
        """Note that something was stored behind these, in this order; where the order is by last use, as
        `touch`.

        It keeps a prefix from going before its suffix. It is no use of its own: whoever stores has looked up
        before.
        """

    def remove(self, extent: int) -> None:
        """Forget an extent that left without having been chosen (removed, expired); ignored if not there."""

    def evict(self, count: int, protected: Callable[[int], bool]) -> list[int]:
        """Choose and forget exactly min(count, unprotected) extents, coldest first.

        Protected extents keep their place. Amortised O(1) per extent chosen, plus one call of `protected` for
        each protected extent that lies in the way.
        """

    def give_up(self, extents: Sequence[int]) -> None:
        """Forget these, which are in the policy, as `evict` does with what it chose."""

    def peek(self, count: int, protected: Callable[[int], bool]) -> list[int]:
        """Up to `count` unprotected extents that are evicted next as it looks now; changes nothing."""

    def coldest(self) -> int | None:
        """The extent that `evict` would look at first, None if there is none; changes nothing."""

    def __len__(self) -> int:
        """The number of extents in the policy."""


class LRU:
    """Least recently used: gives up the extent whose last insertion or touch is the longest ago."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()  # coldest first

    def __len__(self) -> int:
        return len(self._order)

    def insert(self, extent: int, key: bytes) -> None:
        assert extent not in self._order, extent
        self._order[extent] = None

    def touch(self, extents: Sequence[int]) -> None:
        move_to_end = self._order.move_to_end
        for extent in extents:
            try:
                move_to_end(extent)
            except KeyError:
                continue  # rare; asking first costs as much as moving

    def refresh(self, extents: Sequence[int]) -> None:
        self.touch(extents)

    def remove(self, extent: int) -> None:
        self._order.pop(extent, None)

    def evict(self, count: int, protected: Callable[[int], bool]) -> list[int]:
        chosen = self.peek(count, protected)
        self.give_up(chosen)
        return chosen

    def give_up(self, extents: Sequence[int]) -> None:
        for extent in extents:
            del self._order[extent]

    def peek(self, count: int, protected: Callable[[int], bool]) -> list[int]:
        return list(islice(filterfalse(protected, self._order), max(count, 0)))

    def coldest(self) -> int | None:
        return next(iter(self._order), None)


class S3FIFO:
    """Three queues, after Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.

    New extents pass through a small queue. Those touched there move on to the main queue, the others are
    given up, and a ghost remembers their keys: a chunk that comes back soon enters the main queue at once.
    There an extent is passed over once for each touch. So chunks that are used once never displace those
    that are used again.

    Where the paper leaves a choice: one touch after the insertion is enough to move on ("accessed more than
    once", the insertion counted), and the ghost remembers as many keys as the pool has extents. Memory goes
    by the largest extent, which is a record's number in the table and so a small integer.
    """

    def __init__(self) -> None:
        self._small = _Queue()
        self._main = _Queue()
        self._ghost = _Ghost()
        self._keys: dict[int, bytes] = {}  # of the small queue; the ghost is not for what leaves the main one
        self._touches = bytearray()  # by extent: touches since it came to its queue, or _OUT

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def insert(self, extent: int, key: bytes) -> None:
        if extent >= len(self._touches):
            self._touches += bytes([_OUT]) * (extent + 1 - len(self._touches))
        assert self._touches[extent] == _OUT, extent
        self._touches[extent] = 0
        if self._ghost.take(key):
            self._main.append(extent)
        else:
            self._small.append(extent)
            self._keys[extent] = key

    def touch(self, extents: Sequence[int]) -> None:
        touches = self._touches
        known = len(touches)
        for extent in extents:
            if extent < known and touches[extent] < TOUCHES_MAX:
                touches[extent] += 1

    def refresh(self, extents: Sequence[int]) -> None:
        pass  # the queues are by insertion, and counting a use twice would make every extent a frequent one

    def remove(self, extent: int) -> None:
        if extent < len(self._touches) and self._touches[extent] != _OUT:
            self._touches[extent] = _OUT
            queue = self._main if self._keys.pop(extent, None) is None else self._small
            queue.remove(extent)

    def evict(self, count: int, protected: Callable[[int], bool]) -> list[int]:
        capacity = len(self)
        chosen: list[int] = []
        passed_small: int | None = None
        passed_main: int | None = None
        while len(chosen) < count:
            extent, is_small = self._next(capacity, len(chosen), passed_small, passed_main)
            if extent is None:
                break
            if protected(extent):
                passed_small, passed_main = (extent, passed_main) if is_small else (passed_small, extent)
            elif self._leaves(extent, is_small, capacity):
                chosen.append(extent)
        return chosen

    def give_up(self, extents: Sequence[int]) -> None:
        capacity = len(self)
        for extent in extents:
            self._touches[extent] = 0
            self._leaves(extent, extent in self._keys, capacity)

    def peek(self, count: int, protected: Callable[[int], bool]) -> list[int]:
        """Those that were touched since they came to their queue stay; a second round takes them as well."""
        untouched: list[int] = []
        touched: list[int] = []
        capacity, small, main = len(self), None, None
        for _ in range(PEEK_SHARE * max(count, 0) + PEEK_MORE):
            if len(untouched) >= count:
                break
            extent, is_small = self._next(capacity, len(untouched), small, main)
            if extent is None:
                break
            small, main = (extent, main) if is_small else (small, extent)
            if not protected(extent):
                (touched if self._touches[extent] else untouched).append(extent)
        return (untouched + touched)[: max(count, 0)]

    def coldest(self) -> int | None:
        return self._next(len(self), 0, None, None)[0]

    def _next(
        self, capacity: int, chosen: int, passed_small: int | None, passed_main: int | None
    ) -> tuple[int | None, bool]:
        """The extent to look at, behind those passed over, or None; and whether it is in the small queue.

        It is the small queue's turn while that has its share, or the main one has nothing. What is chosen
        counts as small, where new extents will replace it: one large eviction chooses as many small ones do.
        """
        extent = self._small.behind(passed_small)
        if extent is not None and (len(self._small) + chosen) * SMALL_SHARE >= capacity:
            return extent, True
        main = self._main.behind(passed_main)
        return (main, False) if main is not None else (extent, True)

    def _leaves(self, extent: int, is_small: bool, capacity: int) -> bool:
        """Take the extent from its queue: to the end of the main one if it was touched, else out (True)."""
        touches = self._touches[extent]
        if is_small:
            self._small.remove(extent)
            key = self._keys.pop(extent)
            if not touches:
                self._ghost.add(key, capacity)
        else:
            self._main.remove(extent)
        if not touches:
            self._touches[extent] = _OUT
            return True
        self._main.append(extent)
        self._touches[extent] = 0 if is_small else touches - 1
        return False


class _Queue:
    """Extents, first in first out, with removal from the middle; all in O(1).

    A doubly linked ring in two lists indexed by extent + 1; index 0 is where the ring begins and ends.
    """

    def __init__(self) -> None:
        self._after = [0]
        self._before = [0]
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, extent: int) -> None:
        index = extent + 1
        if index >= len(self._after):
            grown = [0] * (index + 1 - len(self._after))
            self._after += grown
            self._before += grown
        last = self._before[0]
        self._after[last] = self._before[0] = index
        self._before[index] = last
        self._after[index] = 0
        self._length += 1

    def remove(self, extent: int) -> None:
        index = extent + 1
        before, after = self._before[index], self._after[index]
        self._after[before] = after
        self._before[after] = before
        self._length -= 1

    def behind(self, extent: int | None) -> int | None:
        """The extent that came next after this one, or the oldest for None; None at the end."""
        index = self._after[0 if extent is None else extent + 1]
        return index - 1 if index else None


class _Ghost:
    """The keys that the small queue gave up last, first in first out.

    A key that was taken stays in the order. If it comes again before that entry has left, it is forgotten
    with that entry: too soon, but that is rare, and a set with a deque is half the size of an OrderedDict.
    """

    def __init__(self) -> None:
        self._members: set[int] = set()
        self._order: deque[int] = deque()

    def add(self, key: bytes, capacity: int) -> None:
        """Remember a key, and forget the oldest beyond `capacity`."""
        mark = _mark(key)
        if mark in self._members:
            return  # another replica of the same chunk
        self._members.add(mark)
        self._order.append(mark)
        while len(self._members) > capacity or len(self._order) > GHOST_ORDER * capacity:
            self._members.discard(self._order.popleft())

    def take(self, key: bytes) -> bool:
        """Whether the key was remembered; it no longer is."""
        mark = _mark(key)
        if mark not in self._members:
            return False
        self._members.remove(mark)
        return True


def _mark(key: bytes) -> int:
    return int.from_bytes(key[:GHOST_KEY_BYTES], "little")


_POLICIES: Final[dict[str, Callable[[], EvictionPolicy]]] = {"lru": LRU, "s3fifo": S3FIFO}


def make_policy(name: PolicyName) -> EvictionPolicy:
    """A new, empty policy; ArgumentError if there is none of that name."""
    if name not in _POLICIES:
        raise ArgumentError("eviction policy", repr(name), " or ".join(map(repr, _POLICIES)))
    return _POLICIES[name]()
