"""What a request trace hits in a pool of a given size: a simulated pool, an unlimited one, and the optimum.

The convention, which the real pool follows too (the figures in tests/test_trace.py hold it):

- A request's `hash_ids` are its chain of prefix blocks. Its hits are the blocks of the longest prefix of
  that chain that is in the pool; the rate is the hits of all requests over the blocks of all requests. In
  tokens, a last block that is not full counts what it has.
- Requests come one after another, in the file's order; timestamps are ignored. A request's missing blocks
  are all stored before the next request is looked up. What it generates is not stored: the trace gives that
  no ids until it is part of the next turn's prompt.
- The lookup touches the blocks that it hit, tail first, so that the prefix's head ends as the most recent.
  Then the store makes room for all missing blocks in one eviction, which spares the request's own blocks,
  inserts them, tail first too, and refreshes those that were there before it, so that the head stays the most
  recent: a use where the order is by last use, none where it is not. Blocks behind a gap that are there
  already are no hits.
- Of a request longer than the pool the head is stored, as much as fits.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import Annotated, Final, Protocol

import msgspec

from metadata_server.eviction import EvictionPolicy
from vcache.errors import ArgumentError

BLOCK_TOKENS: Final = 512
"""Tokens of a block in Mooncake's traces."""

NEVER: Final = 1 << 62
"""The position of a next use that does not come."""


class Row(msgspec.Struct, frozen=True):
    """What is used of a trace's line: the prompt's tokens and the ids of its blocks."""

    input_length: Annotated[int, msgspec.Meta(ge=0)]
    hash_ids: list[int]


@dataclass(frozen=True)
class Request:
    """One prompt: its length in tokens and the keys of its prefix blocks."""

    tokens: int
    keys: Sequence[bytes]


@dataclass(frozen=True)
class Replay:
    """What a pool hit in a whole trace, and how long it took to say so."""

    requests: int
    blocks: int
    tokens: int
    hit_blocks: int
    hit_tokens: int
    seconds: float

    @property
    def block_rate(self) -> float:
        return self.hit_blocks / self.blocks if self.blocks else 0.0

    @property
    def token_rate(self) -> float:
        return self.hit_tokens / self.tokens if self.tokens else 0.0

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds if self.seconds else 0.0


class Pool(Protocol):
    """What a trace is replayed through."""

    def prefix_hit(self, keys: Sequence[bytes]) -> int:
        """The number of leading keys that are in the pool; they count as used."""

    def store(self, keys: Sequence[bytes]) -> int:
        """Store those keys that are not in the pool, as many as fit, and return how many that were."""


def load_trace(path: Path) -> list[Request]:
    """The requests of a trace in Mooncake's FAST '25 format, one JSON object a line, in the file's order.

    ArgumentError, which names the line and the field, if a line is something else or there is none; OSError.
    """
    decoder = msgspec.json.Decoder(Row)
    key_of: dict[int, bytes] = {}
    requests = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = decoder.decode(line)
            except msgspec.DecodeError as error:
                wanted = f'{{"input_length": tokens, "hash_ids": [...]}}: {error}'
                raise ArgumentError(f"{path} line {number}", repr(line[:80]), wanted) from error
            keys = [key_of.get(i) or key_of.setdefault(i, key_of_id(i)) for i in row.hash_ids]
            requests.append(Request(row.input_length, keys))
    if not requests:
        raise ArgumentError(str(path), "no requests", "one JSON object a line")
    return requests


def key_of_id(hash_id: int) -> bytes:
    """A chunk key for an id of the trace: 32 bytes."""
    return blake2b(str(hash_id).encode(), digest_size=32).digest()


def replay(
    requests: Sequence[Request],
    pool: Pool,
    block_tokens: int = BLOCK_TOKENS,
    progress: Callable[[Iterable[Request]], Iterable[Request]] = iter,
) -> Replay:
    """Look up and store every request, one after another; what that hit."""
    hit_blocks = hit_tokens = 0
    start = perf_counter()
    for request in progress(requests):
        hit = pool.prefix_hit(request.keys)
        pool.store(request.keys)
        hit_blocks += hit
        hit_tokens += min(hit * block_tokens, request.tokens)
    seconds = perf_counter() - start
    blocks = sum(len(request.keys) for request in requests)
    tokens = sum(request.tokens for request in requests)
    return Replay(len(requests), blocks, tokens, hit_blocks, hit_tokens, seconds)


class SimulatedPool:
    """A pool of `capacity` blocks under one of the server's own eviction policies, without the server."""

    def __init__(self, capacity: int, policy: EvictionPolicy) -> None:
        self._extents: dict[bytes, int] = {}
        self._keys: list[bytes] = [b""] * capacity  # by extent
        self._free = list(range(capacity))
        self._policy = policy

    def prefix_hit(self, keys: Sequence[bytes]) -> int:
        prefix = []
        for key in keys:
            extent = self._extents.get(key)
            if extent is None:
                break
            prefix.append(extent)
        self._policy.touch(prefix[::-1])
        return len(prefix)

    def store(self, keys: Sequence[bytes]) -> int:
        present = [self._extents[key] for key in keys if key in self._extents]
        missing = [key for key in dict.fromkeys(keys) if key not in self._extents]
        if len(missing) > len(self._free):
            self._make_room(len(missing) - len(self._free), set(present))
        fitting = missing[: len(self._free)]
        for key in reversed(fitting):
            extent = self._free.pop()
            self._extents[key] = extent
            self._keys[extent] = key
            self._policy.insert(extent, key)
        self._policy.refresh(present[::-1])
        return len(fitting)

    def _make_room(self, count: int, own: set[int]) -> None:
        for extent in self._policy.evict(count, own.__contains__):
            del self._extents[self._keys[extent]]
            self._free.append(extent)


class UnlimitedPool:
    """A pool that everything fits in: the hits that the trace has to give."""

    def __init__(self) -> None:
        self._keys: set[bytes] = set()

    def prefix_hit(self, keys: Sequence[bytes]) -> int:
        return next((n for n, key in enumerate(keys) if key not in self._keys), len(keys))

    def store(self, keys: Sequence[bytes]) -> int:
        before = len(self._keys)
        self._keys.update(keys)
        return len(self._keys) - before


class BeladyPool:
    """The optimum for `capacity` blocks: knows the future, keeps what is used soonest, declines the rest.

    Belady, "A study of replacement algorithms for a virtual-storage computer", 1966, with bypass. It is
    optimal for prefix hits too: every use of a block in a chain is just behind one of the block before it,
    so that the block before it is never the one used later. To be replayed over the very requests that it
    was made for.
    """

    def __init__(self, capacity: int, requests: Sequence[Request]) -> None:
        self._capacity = capacity
        self._starts = [0, *accumulate(len(request.keys) for request in requests)]
        self._next_use = _next_uses(requests, self._starts[-1])
        self._request = 0
        self._cached: dict[bytes, int] = {}  # key -> position of its next use
        self._latest: list[tuple[int, bytes]] = []  # heap of (-next use, key), some of them outdated

    def prefix_hit(self, keys: Sequence[bytes]) -> int:
        return next((n for n, key in enumerate(keys) if key not in self._cached), len(keys))

    def store(self, keys: Sequence[bytes]) -> int:
        start = self._starts[self._request]
        self._request += 1
        stored = 0
        for position, key in enumerate(keys, start):
            next_use = self._next_use[position]
            known = key in self._cached
            if not known and not self._room_for(next_use):
                continue
            self._cached[key] = next_use
            heapq.heappush(self._latest, (-next_use, key))
            stored += not known
        return stored

    def _room_for(self, next_use: int) -> bool:
        """Whether there is room for a block that is used then, if need be instead of one used later."""
        if len(self._cached) < self._capacity:
            return True
        while self._latest:
            negative, key = self._latest[0]
            if self._cached.get(key) == -negative:
                if -negative <= next_use:
                    return False
                del self._cached[key]
                heapq.heappop(self._latest)
                return True
            heapq.heappop(self._latest)
        return False


def _next_uses(requests: Sequence[Request], positions: int) -> list[int]:
    """For each block of the whole trace, in order, the position at which its key comes next, or NEVER."""
    next_use = [NEVER] * positions
    seen: dict[bytes, int] = {}
    position = positions
    for request in reversed(requests):
        for key in reversed(request.keys):
            position -= 1
            next_use[position] = seen.get(key, NEVER)
            seen[key] = position
    return next_use
