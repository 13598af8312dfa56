"""The chunks of one pool: where each lies, in which order they were used, and how they are forgotten.

The base of `metadata_server.directory.Directory`, which is made of this and of what its requests do with it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from metadata_server.allocator import Allocator
from metadata_server.errors import Refusal
from metadata_server.eviction import EvictionPolicy, make_policy
from metadata_server.rights import Holdings, Indices, Rights
from vcache import limits, protocol
from vcache.protocol import EXTENT, HANDLE, ErrorCode
from vcache.table import ExtentTable, State

NS: Final = 1_000_000_000
_EXPIRIES_SPARE: Final = 1_024
"""Entries of chunks that have gone already that the heap of expiries may hold beside as many as there are
chunks.
"""


@dataclass(frozen=True)
class Policy:
    """What the operator chose; times in the units of their names, 0 = never."""

    eviction: Literal["lru", "s3fifo"] = "lru"
    default_ttl_ms: int = 0
    lease_ms: int = 5_000
    pinned_bytes_max: int = limits.PINNED_BYTES_MAX_DEFAULT


class Chunks:
    """Keys and replicas over the extent table; state of which the parts of the directory share all."""

    def __init__(self, table: ExtentTable, policy: Policy) -> None:
        self.table = table
        self.policy = policy
        self.allocator = Allocator(table)
        self.rights = Rights(table)
        self.chunks: dict[bytes, int] = {}
        self.replicas: dict[bytes, list[int]] = {}
        self.counters: Counter[str] = Counter()
        self.labels: dict[bytes, str] = {}
        self._orders: dict[tuple[int, int], EvictionPolicy] = {}
        self._expiries: list[tuple[int, int, int]] = []
        self._layouts: dict[bytes, int] = {}
        self._layouts_max = limits.LAYOUTS_MAX
        self._layout_numbers = itertools.count(1)
        self._layout_of = np.zeros(table.capacity, np.int32)
        self._slab_of = np.zeros(table.capacity, np.int32)
        self._slab_used_ns: dict[int, int] = {}
        # What an acquire answers for each committed extent, ready to be sent.
        self._grants = np.zeros(table.capacity, EXTENT)
        self._unbooked: Callable[[], None] | None = None

    def adopt_chunk(self, index: int, key: bytes, used_ns: int, expiry_ns: int) -> None:
        """Take up a chunk that the table says is committed: findable, evictable, expiring."""
        first = self.chunks.setdefault(key, index)
        if first != index:
            other = index
            if self.allocator.rank_of(index) < self.allocator.rank_of(first):  # readers find the lowest rank
                self.chunks[key], other = index, first
            self.replicas.setdefault(key, []).append(other)
        slab = self.allocator.slab_of(index)
        self._order_of(index).insert(index, key)
        self._slab_of[index] = slab.number
        self._slab_used_ns[slab.number] = max(used_ns, self._slab_used_ns.get(slab.number, 0))
        if expiry_ns:
            heapq.heappush(self._expiries, (expiry_ns, index, self.table.generation(index)))
            if len(self._expiries) > 2 * len(self.chunks) + _EXPIRIES_SPARE:
                self._expiries = [each for each in self._expiries if self._is(*each[1:], State.COMMITTED)]
                heapq.heapify(self._expiries)

    def prepare_grants(self, indices: list[int]) -> None:
        """Make ready what an acquire answers for these committed extents."""
        self._grants[indices] = np.frombuffer(self._pack(indices, "length"), EXTENT)

    def set_layout(self, index: int, layout: bytes) -> None:
        """After a restart: remember under which layout an extent was reserved."""
        self._layout_of[index] = self._layout_number(layout)

    def _layout_number(self, layout: bytes) -> int:
        number = self._layouts.get(layout)
        if number is None:
            if len(self._layouts) >= self._layouts_max:
                used = set(self._layout_of[self.table.in_use()].tolist())
                self._layouts = {each: at for each, at in self._layouts.items() if at in used}
                self._layouts_max = max(limits.LAYOUTS_MAX, 2 * len(self._layouts))
            number = self._layouts[layout] = next(self._layout_numbers)
        return number

    def _replicas_of(self, key: bytes) -> list[int]:
        return [self.chunks[key], *self.replicas.get(key, ())]

    def _elsewhere(self, key: bytes, index: int) -> bool:
        """Whether no replica of the key is in the segment that this extent is in."""
        segment = self.table.segment[index]
        return all(self.table.segment[replica] != segment for replica in self._replicas_of(key))

    def _records_used(self) -> int:
        used = self.table.in_use()
        return int(used[-1]) + 1 if len(used) else 0

    def _is(self, index: int, generation: int, state: State) -> bool:
        return self.table.generation(index) == generation and self.table.state(index) is state

    # -- use

    def catch_up(self) -> None:
        """Book the use that the last answer granted, and its lease, while its reader is busy with it."""
        if self._unbooked is not None:
            book, self._unbooked = self._unbooked, None
            book()

    def _lease(self, mine: Holdings, rid: int, indices: Indices, now_ns: int) -> None:
        self.rights.lease(mine, rid, indices, now_ns + self.policy.lease_ms * 1_000_000)
        self._use(indices[::-1], now_ns)

    def _use(self, indices: Indices, now_ns: int, *, counts: bool = True) -> None:
        """The extents are used, the last one most recently; `counts` as in touch, otherwise in refresh."""
        if not len(indices):
            return
        self.table.used_ns[indices] = np.arange(now_ns, now_ns + len(indices), dtype=np.uint64)
        for number in set(self._slab_of[indices].tolist()):
            self._slab_used_ns[number] = now_ns
        by_order: dict[tuple[int, int], list[int]] = {}
        if len(self._orders) == 1:
            by_order = {next(iter(self._orders)): indices.tolist()}
        else:
            for index in indices.tolist():
                size = self.allocator.slab_of(index).size
                by_order.setdefault((self.allocator.rank_of(index), size), []).append(index)
        for which, extents in by_order.items():
            order = self._order(*which)
            (order.touch if counts else order.refresh)(extents)

    def _order(self, rank: int, size: int) -> EvictionPolicy:
        """The order of eviction among the extents of one size in segments of one rank."""
        order = self._orders.get((rank, size))
        if order is None:
            order = self._orders[rank, size] = make_policy(self.policy.eviction)
        return order

    def _order_of(self, index: int) -> EvictionPolicy:
        return self._order(self.allocator.rank_of(index), self.allocator.slab_of(index).size)

    # -- forgetting

    def _unbind(self, index: int, *, in_order: bool = True) -> None:
        """Nobody finds this replica any more."""
        key = self.table.key(index)
        others = self.replicas.pop(key, [])
        if self.chunks[key] == index:
            if others:
                self.chunks[key] = min(others, key=self.allocator.rank_of)
                others.remove(self.chunks[key])
            else:
                del self.chunks[key]
        else:
            others.remove(index)
        if others:
            self.replicas[key] = others
        if in_order:
            self._order_of(index).remove(index)

    def _forget(self, index: int) -> None:
        """Unbind a committed extent and free it, now or when the last pin ends."""
        self._unbind(index)
        if self.table.pins[index]:
            self.table.orphan(index)
        else:
            self.table.free(index)
            self.allocator.give_back(index)

    def _forget_all(self, keys: Iterable[bytes]) -> protocol.Reply:
        count = 0
        for key in dict.fromkeys(keys):
            for index in self._replicas_of(key):
                self._forget(index)
            count += 1
        self.counters["removed"] += count
        return protocol.Done(count)

    def _give_up(self, mine: Holdings, index: int) -> None:
        del mine.reservations[index]
        self.table.free(index)
        self.allocator.give_back(index)

    def _unpinned(self, indices: Indices) -> None:
        """Nobody pins these any more: those that were forgotten meanwhile are free."""
        for index in indices[self.table.in_state(indices, State.ORPHANED)].tolist():
            if index not in self.rights.inherited:
                self.table.free(index)
                self.allocator.give_back(index)

    def _pack(self, indices: Indices | list[int], length: Literal["size", "length"]) -> bytes:
        extents = np.zeros(len(indices), EXTENT)
        records = self.table.records[indices]
        extents["index"] = indices
        extents["generation"] = records["word"] >> np.uint64(32)
        for name, column in (("segment", "segment"), ("offset", "offset"), ("length", length)):
            extents[name] = records[column]
        return extents.tobytes()


def keys_of(packed: bytes) -> list[bytes]:
    """The keys packed in a request. Raises Refusal for too many, RemoteProtocolError."""
    keys = protocol.split_keys(packed)
    if len(keys) > limits.KEYS_PER_REQUEST_MAX:
        raise Refusal(ErrorCode.LIMIT, f"keys: got {len(keys)}, wanted at most {limits.KEYS_PER_REQUEST_MAX}")
    return keys


def handles_of(packed: bytes) -> protocol.Handles:
    """The handles packed in a request. Raises Refusal for too many, RemoteProtocolError."""
    handles = protocol.unpack(packed, HANDLE)
    if len(handles) > limits.RESERVATIONS_PER_SESSION_MAX:
        wanted = f"wanted at most {limits.RESERVATIONS_PER_SESSION_MAX}"
        raise Refusal(ErrorCode.LIMIT, f"handles: got {len(handles)}, {wanted}")
    return handles
