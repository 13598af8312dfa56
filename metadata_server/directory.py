"""The directory: which chunk lies in which extent, who may write, read and evict it. No socket, thread or
clock.

`handle(session, rid, request, now_ns)` answers one request; a refused one raises `Refusal` and has changed
nothing. All state that must outlive the server is in the extent table; everything else here is rebuilt from
it (`metadata_server.recovery`).
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from metadata_server.allocator import Allocator, Slab, extent_size
from metadata_server.errors import Refusal
from metadata_server.eviction import EvictionPolicy, make_policy
from metadata_server.rights import Holdings, Indices, Rights
from vcache import limits, protocol
from vcache.protocol import EXTENT, HANDLE, ErrorCode, Outcome
from vcache.table import ExtentTable, State

NS = 1_000_000_000
_EXPIRIES_SPARE = 1_024


@dataclass(frozen=True)
class Policy:
    """What the operator chose; times in the units of their names, 0 = never."""

    eviction: Literal["lru", "s3fifo"] = "lru"
    default_ttl_ms: int = 0
    lease_ms: int = 5_000
    pinned_bytes_max: int = limits.PINNED_BYTES_MAX_DEFAULT


class Directory:
    """All chunks of one pool."""

    def __init__(self, table: ExtentTable, policy: Policy) -> None:
        self.table = table
        self.policy = policy
        self.allocator = Allocator(table)
        self.rights = Rights(table)
        self.chunks: dict[bytes, int] = {}
        self.replicas: dict[bytes, list[int]] = {}
        self.counters: Counter[str] = Counter()
        self.labels: dict[bytes, str] = {}
        self._orders: dict[int, EvictionPolicy] = {}
        self._expiries: list[tuple[int, int, int]] = []
        self._layouts: dict[bytes, int] = {}
        self._layouts_max = limits.LAYOUTS_MAX
        self._layout_numbers = itertools.count(1)
        self._layout_of = np.zeros(table.capacity, np.int32)
        self._slab_of = np.zeros(table.capacity, np.int32)
        self._slab_used_ns: dict[int, int] = {}
        # What an acquire answers for each committed extent, ready to be sent.
        self._grants = np.zeros(table.capacity, EXTENT)
        self._unbooked: tuple[Holdings, int, Indices, int] | None = None
        self._handlers: dict[type[Any], Callable[[Holdings, int, Any, int], protocol.Reply]] = {
            protocol.Reserve: self._reserve,
            protocol.Commit: self._commit,
            protocol.Abort: self._abort,
            protocol.Lookup: self._lookup,
            protocol.Contains: self._contains,
            protocol.Acquire: self._acquire,
            protocol.Release: self._release,
            protocol.Touch: self._touch,
            protocol.Remove: self._remove,
            protocol.Clear: self._clear,
            protocol.List: self._list,
            protocol.Describe: self._describe,
            protocol.Declare: self._declare,
            protocol.Check: self._check,
        }

    def handle(self, session: int, rid: int, request: protocol.Request, now_ns: int) -> protocol.Reply:
        """Answer one request. Raises Refusal (nothing has changed), RemoteProtocolError.

        Call `catch_up` when the answer is on its way: what only later requests can see is done there.
        """
        self.tick(now_ns)
        return self._handlers[type(request)](self.rights.of(session), rid, request, now_ns)

    def catch_up(self) -> None:
        """Book the lease and the use that the last answer granted, while its reader is busy with it."""
        if self._unbooked is not None:
            (mine, rid, indices, now_ns), self._unbooked = self._unbooked, None
            self.rights.lease(mine, rid, indices, now_ns + self.policy.lease_ms * 1_000_000)
            self._use(indices[::-1], now_ns)

    def tick(self, now_ns: int) -> None:
        """End leases and chunks whose time is up."""
        self.catch_up()
        self.rights.expire_leases(now_ns)
        while self._expiries and self._expiries[0][0] <= now_ns:
            _, index, generation = heapq.heappop(self._expiries)
            if self._is(index, generation, State.COMMITTED):
                self.counters["expired"] += 1
                self._forget(index)

    # ------------------------------------------------------------------------------------------- sessions,
    # segments

    def end_session(self, session: int) -> None:
        """The session is dead: everything it held is free. Its segments are the caller's to drop."""
        self.catch_up()
        holdings = self.rights.sessions.get(session)
        if holdings is None:
            return
        for rid in list(holdings.leases):
            self.rights.end_lease(holdings, rid)
        for rid in list(holdings.pins):
            self._unpinned(self.rights.unpin(holdings, rid, None))
        for index in list(holdings.reservations):
            self._give_up(holdings, index)
        del self.rights.sessions[session]
        self._settle_if_all_are_here()

    def await_sessions(self, alive: Iterable[int]) -> None:
        """After a restart: these sessions live and have not declared yet; all others that the table knows are
        dead.
        """
        living = set(alive)
        for session in living:
            self.rights.of(session).awaited = True
        for session in set(self.rights.sessions) - living:
            self.end_session(session)
        self._settle_if_all_are_here()

    def add_segment(self, session: int, attach: protocol.Attach) -> int:
        """Lend a segment to the pool, or recognise one that the table knows; returns its number."""
        known = self.find_segment(attach.segment_id, attach.incarnation)
        if known is not None:
            if int(self.table.segments["session"][known]) != session:
                raise Refusal(ErrorCode.FOREIGN, "attach: another session lends this segment")
            return int(self.table.segments["word"][known]) >> 32
        slot = next(
            (slot for slot in range(limits.SEGMENTS_MAX) if not self.table.segment_in_use(slot)), None
        )
        if slot is None:
            raise Refusal(
                ErrorCode.LIMIT, f"segments: {limits.SEGMENTS_MAX} are there already, no more fit the table"
            )
        number = self.table.next_segment()
        self.table.write_segment(
            slot,
            number,
            segment_id=attach.segment_id,
            incarnation=attach.incarnation,
            size=attach.size,
            data_offset=attach.data_offset,
            session=session,
            rank=attach.rank,
            device=attach.device,
        )
        self.allocator.add_segment(number, attach.data_offset, attach.size, attach.rank)
        return number

    def find_segment(self, segment_id: bytes, incarnation: int) -> int | None:
        """The slot of a segment that is in the table."""
        for slot in range(limits.SEGMENTS_MAX):
            record = self.table.segments[slot]
            same = record["incarnation"] == incarnation and bytes(record["segment_id"]) == segment_id
            if same and self.table.segment_in_use(slot):
                return slot
        return None

    def drop_segment(self, number: int) -> None:
        """End a segment's incarnation: its chunks are gone, nobody is granted its extents any more."""
        self.catch_up()
        for slot in range(limits.SEGMENTS_MAX):
            if self.table.segment_in_use(slot) == number:
                self.table.drop_segment(slot)
        inside = np.flatnonzero(self.table.segment[: self._records_used()] == number)
        lost = [index for index in inside.tolist() if self.allocator.in_slab(index)]
        for index in lost:
            if self.table.state(index) is State.COMMITTED:
                self._unbind(index)
        self.rights.forget_extents(lost)
        self.allocator.drop_segment(number)

    def _records_used(self) -> int:
        used = self.table.in_use()
        return int(used[-1]) + 1 if len(used) else 0

    # ------------------------------------------------------------------------------------------- writing

    def _reserve(self, mine: Holdings, rid: int, ask: protocol.Reserve, now_ns: int) -> protocol.Reply:
        if len(ask.layout) != limits.FINGERPRINT_BYTES or not 0 < ask.size <= limits.CHUNK_BYTES_MAX:
            raise Refusal(
                ErrorCode.ARGUMENT, f"reserve: size {ask.size} or a layout of {len(ask.layout)} bytes"
            )
        keys = _keys(ask.keys)
        there = [self.chunks.get(key) for key in keys]
        wanted = there.count(None) if keys else ask.count
        room = limits.RESERVATIONS_PER_SESSION_MAX - len(mine.reservations)
        if not 0 <= wanted <= room:
            raise Refusal(
                ErrorCode.LIMIT, f"reserve: {wanted} extents wanted, this session may reserve {room} more"
            )
        present = [index for index in there if index is not None]
        indices = np.array(present[::-1], np.intp)
        self._use(indices, now_ns, counts=False)
        granted = self._allocate(wanted, extent_size(ask.size), ask.near, set(present))
        for index in granted:
            self.table.reserve(index, mine.session, rid, ask.layout)
            mine.reservations[index] = rid
        if granted:
            self._layout_of[granted] = self._layout_number(ask.layout)
            mine.remember_head(rid, indices, self.rights.generations(indices))
        self.counters["reserved"] += len(granted)
        self.counters["unfitted"] += wanted - len(granted)
        flags = bytes(index is not None for index in there)
        return protocol.Reserved(self._pack(np.array(granted, np.intp), "size"), flags, wanted)

    def _commit(self, mine: Holdings, rid: int, ask: protocol.Commit, now_ns: int) -> protocol.Reply:
        handles = protocol.unpack(ask.handles, HANDLE)
        keys = _keys(ask.keys)
        lengths = protocol.unpack(ask.lengths, np.dtype("<u8")).tolist()
        if not len(handles) == len(keys) == len(lengths) or len(ask.namespace) != limits.NAMESPACE_BYTES:
            raise Refusal(
                ErrorCode.ARGUMENT, "commit: handles, keys and lengths differ in number, or no namespace"
            )
        if ask.ttl_ms > limits.TTL_MS_MAX:
            raise Refusal(
                ErrorCode.ARGUMENT, f"commit: ttl_ms {ask.ttl_ms}, wanted at most {limits.TTL_MS_MAX}"
            )
        ttl_ms = min(self.policy.default_ttl_ms, limits.TTL_MS_MAX) if ask.ttl_ms < 0 else ask.ttl_ms
        expiry_ns = now_ns + ttl_ms * 1_000_000 if ttl_ms else 0
        outcomes = bytearray(len(keys))
        # Tail first, so that the head of a prefix is the most recent.
        for at in range(len(keys) - 1, -1, -1):
            index, generation = handles[at].item()
            if index not in mine.reservations or self.table.generation(index) != generation:
                outcomes[at] = Outcome.STALE
            elif not 0 < lengths[at] <= int(self.table.records["size"][index]):
                raise Refusal(
                    ErrorCode.ARGUMENT, f"commit: lengths[{at}] is {lengths[at]}, more than the extent's room"
                )
        rids = {mine.reservations.get(index, 0) for index in handles["index"].tolist()}
        for at in range(len(keys) - 1, -1, -1):
            if outcomes[at] == Outcome.COMMITTED:
                index = int(handles["index"][at])
                outcomes[at] = self._bind(
                    mine, index, keys[at], ask, lengths[at], expiry_ns, now_ns + len(keys) - at
                )
        bound = np.frombuffer(outcomes, np.uint8) == Outcome.COMMITTED
        self.prepare_grants(handles["index"][bound].tolist())
        for rid in rids & mine.heads.keys():
            indices, generations = mine.heads[rid]
            same = self.rights.generations(indices) == generations
            self._use(indices[same], now_ns + len(keys) + 1, counts=False)
        return protocol.Committed(bytes(outcomes))

    def _bind(
        self,
        mine: Holdings,
        index: int,
        key: bytes,
        ask: protocol.Commit,
        length: int,
        expiry_ns: int,
        used_ns: int,
    ) -> int:
        if index not in mine.reservations:
            return Outcome.STALE
        if key in self.chunks and not (ask.replica and self._elsewhere(key, index)):
            self.counters["lost_commits"] += 1
            return Outcome.LOST
        del mine.reservations[index]
        self.table.commit(index, key, length, ask.namespace, -(-expiry_ns // NS), used_ns)
        self.adopt_chunk(index, key, used_ns, expiry_ns)
        self.counters["committed"] += 1
        self.counters["committed_bytes"] += length
        return Outcome.COMMITTED

    def adopt_chunk(self, index: int, key: bytes, used_ns: int, expiry_ns: int) -> None:
        """Take up a chunk that the table says is committed: findable, evictable, expiring."""
        if key in self.chunks:
            self.replicas.setdefault(key, []).append(index)
        else:
            self.chunks[key] = index
        slab = self.allocator.slab_of(index)
        self._order(slab.size).insert(index, key)
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

    def _elsewhere(self, key: bytes, index: int) -> bool:
        """Whether no replica of the key is in the segment that this extent is in."""
        segment = self.table.segment[index]
        return all(self.table.segment[replica] != segment for replica in self._replicas_of(key))

    def _replicas_of(self, key: bytes) -> list[int]:
        return [self.chunks[key], *self.replicas.get(key, ())]

    def _abort(self, mine: Holdings, rid: int, ask: protocol.Abort, now_ns: int) -> protocol.Reply:
        count = 0
        for index, generation in _handles(ask.handles).tolist():
            if index in mine.reservations and self.table.generation(index) == generation:
                self._give_up(mine, index)
                count += 1
        return protocol.Done(count)

    def _give_up(self, mine: Holdings, index: int) -> None:
        del mine.reservations[index]
        self.table.free(index)
        self.allocator.give_back(index)

    # ------------------------------------------------------------------------------------------- reading

    def _find(self, keys: list[bytes], layout: bytes) -> list[int]:
        """Extents of the leading keys that are there in this layout."""
        places = list(map(self.chunks.get, keys))
        found = cast("list[int]", places[: places.index(None)] if None in places else places)
        known = self._layouts.get(layout)
        if known is None:
            return []
        if len(self._layouts) > 1:
            foreign = np.flatnonzero(self._layout_of[found] != known)
            del found[int(foreign[0]) if len(foreign) else len(found) :]
        return found

    def _flags(self, keys: list[bytes], layout: bytes) -> list[int]:
        """Of each key its extent, or -1."""
        get = self.chunks.get
        indices = np.array([get(key, -1) for key in keys], np.intp)
        known = self._layouts.get(layout, -1)
        places: list[int] = np.where(
            (indices >= 0) & (self._layout_of[indices] == known), indices, -1
        ).tolist()
        return places

    def _lookup(self, mine: Holdings, rid: int, ask: protocol.Lookup, now_ns: int) -> protocol.Reply:
        keys = _keys(ask.keys)
        self.counters["looked_up"] += len(keys)
        if ask.bitmap:
            flags = bytes(index >= 0 for index in self._flags(keys, ask.layout))
            return protocol.Found((flags + b"\0").index(0), flags)
        return protocol.Found(len(self._find(keys, ask.layout)))

    def _contains(self, mine: Holdings, rid: int, ask: protocol.Contains, now_ns: int) -> protocol.Reply:
        flags = bytes(key in self.chunks for key in _keys(ask.keys))
        return protocol.Found((flags + b"\0").index(0), flags)

    def _acquire(self, mine: Holdings, rid: int, ask: protocol.Acquire, now_ns: int) -> protocol.Reply:
        if len(mine.leases) + len(mine.pins) >= limits.RIGHTS_PER_SESSION_MAX:
            raise Refusal(
                ErrorCode.LIMIT, f"acquire: this session holds {limits.RIGHTS_PER_SESSION_MAX} rights"
            )
        if rid in mine.leases or rid in mine.pins:
            raise Refusal(
                ErrorCode.STALE, f"acquire: request {rid} was granted, its answer is not kept any more"
            )
        keys = _keys(ask.keys)
        if ask.pin and len(set(keys)) != len(keys):
            raise Refusal(ErrorCode.ARGUMENT, "acquire: keys: got one twice, wanted distinct keys to pin")
        flags = b""
        if ask.prefix:
            found = self._find(keys, ask.layout)
        else:
            places = self._flags(keys, ask.layout)
            flags = bytes(index >= 0 for index in places)
            found = [index for index in places if index >= 0]
        if ask.near and self.replicas:
            found = [self._nearest(index, ask.near) for index in found]
        self.counters["wanted_chunks"] += len(keys)
        self.counters["hit_chunks"] += len(found)
        indices = np.array(found, np.intp)
        if ask.pin:
            self._use(indices[::-1], now_ns)
            indices, flags = self._within_quota(mine, indices, flags)
            if len(indices):
                sizes = int(self.table.records["size"][indices].sum())
                self.rights.pin(mine, rid, indices, self.rights.generations(indices), sizes)
        elif len(indices):
            self._unbooked = mine, rid, indices, now_ns
        extents = self._grants.take(indices).tobytes()
        return protocol.Acquired(extents, flags, 0 if ask.pin else self.policy.lease_ms)

    def _nearest(self, index: int, near: int) -> int:
        for replica in self.replicas.get(self.table.key(index), ()):
            same_layout = self._layout_of[replica] == self._layout_of[index]
            if self.table.segment[replica] == near and self.table.segment[index] != near and same_layout:
                return replica
        return index

    def _within_quota(self, mine: Holdings, indices: Indices, flags: bytes) -> tuple[Indices, bytes]:
        """The leading ones that this session may still pin; what does not fit is a miss."""
        sizes = np.cumsum(self.table.records["size"][indices].astype(np.int64))
        fits = int(np.searchsorted(sizes, self.policy.pinned_bytes_max - mine.pinned_bytes, "right"))
        fits = max(0, min(fits, limits.PINNED_EXTENTS_PER_SESSION_MAX - mine.pinned_count))
        if fits < len(indices):
            self.counters["pin_quota_misses"] += len(indices) - fits
            there = np.flatnonzero(np.frombuffer(flags, np.uint8))
            if len(there):
                flags = flags[: int(there[fits])] + bytes(len(flags) - int(there[fits]))
        return indices[:fits], flags

    def _release(self, mine: Holdings, rid: int, ask: protocol.Release, now_ns: int) -> protocol.Reply:
        self.rights.end_lease(mine, ask.right)
        part = dict(_handles(ask.handles).tolist()) if ask.handles else None
        self._unpinned(self.rights.unpin(mine, ask.right, part))
        return protocol.Done()

    def _unpinned(self, indices: list[int]) -> None:
        for index in indices:
            if self.table.state(index) is State.ORPHANED and index not in self.rights.inherited:
                self.table.free(index)
                self.allocator.give_back(index)

    def _touch(self, mine: Holdings, rid: int, ask: protocol.Touch, now_ns: int) -> protocol.Reply:
        found = [self.chunks[key] for key in _keys(ask.keys) if key in self.chunks]
        self._use(np.array(found[::-1], np.intp), now_ns)
        return protocol.Done(len(found))

    def _use(self, indices: Indices, now_ns: int, *, counts: bool = True) -> None:
        """The extents are used, the last one most recently; `counts` as in touch, otherwise in refresh."""
        if not len(indices):
            return
        self.table.used_ns[indices] = np.arange(now_ns, now_ns + len(indices), dtype=np.uint64)
        for number in set(self._slab_of[indices].tolist()):
            self._slab_used_ns[number] = now_ns
        by_size: dict[int, list[int]] = {}
        if len(self._orders) == 1:
            by_size = {next(iter(self._orders)): indices.tolist()}
        else:
            for index in indices.tolist():
                by_size.setdefault(self.allocator.slab_of(index).size, []).append(index)
        for size, extents in by_size.items():
            order = self._order(size)
            (order.touch if counts else order.refresh)(extents)

    # ------------------------------------------------------------------------------------------- room

    def _order(self, size: int) -> EvictionPolicy:
        order = self._orders.get(size)
        if order is None:
            order = self._orders[size] = make_policy(self.policy.eviction)
        return order

    def _allocate(self, count: int, size: int, near: int, keep: set[int]) -> list[int]:
        """Up to `count` extents, FREE in the table; room is made by giving up what is coldest in the whole
        pool.
        """
        taken = self.allocator.take(count, size, near)
        while len(taken) < count and self._make_room(count - len(taken), size, keep):
            more = self.allocator.take(count - len(taken), size, near)
            if not more:
                break
            taken += more
        return taken

    def _make_room(self, count: int, size: int, keep: set[int]) -> bool:
        """Evict up to `count` extents of this size, or empty slabs of other sizes that are colder; False if
        neither can be.
        """
        order = self._order(size)
        coldest = order.coldest()
        limit_ns = int(self.table.used_ns[coldest]) if coldest is not None else None
        slabs = self._colder_slabs(count, size, limit_ns, keep)
        if slabs:
            self._empty_all(slabs)
            return True
        victims = order.evict(count, lambda index: index in keep or self.rights.held(index))
        self._evicted(victims)
        if not victims and coldest is not None:
            slabs = self._colder_slabs(count, size, None, keep)
            self._empty_all(slabs)
            return bool(slabs)
        return bool(victims)

    def _empty_all(self, slabs: list[Slab]) -> None:
        for slab in slabs:
            self._empty(slab)
        sizes = self.allocator.sizes()
        for size in [size for size, order in self._orders.items() if not len(order) and size not in sizes]:
            del self._orders[size]

    def _colder_slabs(self, count: int, size: int, limit_ns: int | None, keep: set[int]) -> list[Slab]:
        """Slabs of other sizes to empty for this size: colder than `limit_ns`, or as cold as there are."""
        if self.allocator.sizes() <= {size}:
            return []
        held = {
            slab: self._held_in(slab, keep)
            for slab in self.allocator.slabs.values()
            if slab.size != size and (limit_ns is None or self._coldness(slab) < limit_ns)
        }

        def may_empty(slab: Slab) -> bool:
            return slab in held and not held[slab].any()

        if not held:
            return []
        if limit_ns is not None:  # as long as there are others, slabs stay whole
            found = self.allocator.windows(count, size, may_empty, self._coldness)
            if found:
                return found
        for slab, flags in list(held.items()):
            if flags.any() and not flags.all():
                held.update({part: self._held_in(part, keep) for part in self._split(slab, flags)})
        return self.allocator.windows(count, size, may_empty, self._coldness)

    def _split(self, slab: Slab, held: NDArray[np.bool_]) -> list[Slab]:
        """Part what is held from what may be evicted: a few pins or stocks must not keep whole slabs."""
        parts = self.allocator.split(slab, held.tolist())
        used_ns = self._slab_used_ns.pop(slab.number, 0)
        for part in parts:
            self._slab_of[part.indices] = part.number
            self._slab_used_ns[part.number] = min(used_ns, int(self.table.used_ns[part.indices].max()))
        return parts

    def _coldness(self, slab: Slab) -> int:
        return 0 if slab.spare else self._slab_used_ns.get(slab.number, 0)

    def _held_in(self, slab: Slab, keep: set[int]) -> NDArray[np.bool_]:
        """Of each extent, whether it must stay: somebody may write or read it, or it is in `keep`."""
        indices = slab.indices
        states = self.table.word[indices] >> np.uint64(28) & np.uint64(0xF)
        held: NDArray[np.bool_] = (states == State.RESERVED) | (states == State.ORPHANED)
        held |= self.table.pins[indices] > 0
        held |= self.rights.leases[indices] > 0
        if not keep.isdisjoint(indices):
            held |= np.isin(indices, list(keep))
        return held

    def _empty(self, slab: Slab) -> None:
        for index in slab.indices:
            if self.table.state(index) is State.COMMITTED:
                self.counters["evicted"] += 1
                self._forget(index)
        if slab.number in self.allocator.slabs:
            self._slab_used_ns.pop(slab.number, None)
            self.allocator.dissolve(slab)

    def _evicted(self, victims: list[int]) -> None:
        self.counters["evicted"] += len(victims)
        for index in victims:
            self._unbind(index, in_order=False)
            self.table.free(index)
            self.allocator.give_back(index)

    # ------------------------------------------------------------------------------------------- forgetting

    def _is(self, index: int, generation: int, state: State) -> bool:
        return self.table.generation(index) == generation and self.table.state(index) is state

    def _unbind(self, index: int, *, in_order: bool = True) -> None:
        """Nobody finds this replica any more."""
        key = self.table.key(index)
        others = self.replicas.pop(key, [])
        if self.chunks[key] == index:
            if others:
                self.chunks[key] = others.pop(0)
            else:
                del self.chunks[key]
        else:
            others.remove(index)
        if others:
            self.replicas[key] = others
        if in_order:
            self._order(self.allocator.slab_of(index).size).remove(index)

    def _forget(self, index: int) -> None:
        """Unbind a committed extent and free it, now or when the last pin ends."""
        self._unbind(index)
        if self.table.pins[index]:
            self.table.orphan(index)
        else:
            self.table.free(index)
            self.allocator.give_back(index)

    def _remove(self, mine: Holdings, rid: int, ask: protocol.Remove, now_ns: int) -> protocol.Reply:
        doomed = [key for key in _keys(ask.keys) if key in self.chunks]
        return self._forget_all(doomed)

    def _clear(self, mine: Holdings, rid: int, ask: protocol.Clear, now_ns: int) -> protocol.Reply:
        if ask.namespace and len(ask.namespace) != limits.NAMESPACE_BYTES:
            raise Refusal(ErrorCode.ARGUMENT, f"clear: namespace of {len(ask.namespace)} bytes")
        spaces = self.table.records["namespace"]
        return self._forget_all(
            [
                key
                for key, at in self.chunks.items()
                if not ask.namespace or bytes(spaces[at]) == ask.namespace
            ]
        )

    def _forget_all(self, keys: Iterable[bytes]) -> protocol.Reply:
        count = 0
        for key in dict.fromkeys(keys):
            for index in self._replicas_of(key):
                self._forget(index)
            count += 1
        self.counters["removed"] += count
        return protocol.Done(count)

    # -------------------------------------------------------------------------------------------
    # reconciliation

    def _declare(self, mine: Holdings, rid: int, ask: protocol.Declare, now_ns: int) -> protocol.Reply:
        if len(ask.pins) > limits.RIGHTS_PER_SESSION_MAX:
            wanted = f"wanted at most {limits.RIGHTS_PER_SESSION_MAX}"
            raise Refusal(ErrorCode.LIMIT, f"declare: got {len(ask.pins)} pins, {wanted}")
        if mine.awaited:
            self.rights.adopt_pins(mine, ask)
        reservations, pins = self.rights.surplus(mine, ask)
        for index in reservations:
            self._give_up(mine, index)
        for right, lost in pins:
            self._unpinned(self.rights.unpin(mine, right, lost))
        mine.settled = max(mine.settled, ask.settled)
        freed = len(reservations) + sum(len(lost) for _, lost in pins)
        self.counters["reclaimed"] += freed
        if mine.awaited:
            mine.awaited = False
            self._settle_if_all_are_here()
        return protocol.Done(freed)

    def _settle_if_all_are_here(self) -> None:
        if self.rights.inherited and not any(holdings.awaited for holdings in self.rights.sessions.values()):
            self._unpinned(self.rights.settle_inherited())

    # ------------------------------------------------------------------------------------------- for people

    def _list(self, mine: Holdings, rid: int, ask: protocol.List, now_ns: int) -> protocol.Reply:
        limit = min(max(ask.limit, 1), limits.LIST_PAGE_MAX)
        states = self.table.word[: self._records_used()] >> np.uint64(28) & np.uint64(0xF)
        committed = np.flatnonzero(states == State.COMMITTED)
        committed = committed[committed >= ask.cursor][: limit + 1]
        rows = [self._row(index, now_ns) for index in committed[:limit].tolist()]
        return protocol.Listed(rows, int(committed[limit]) if len(committed) > limit else 0)

    def _row(self, index: int, now_ns: int) -> protocol.ChunkRow:
        record = self.table.records[index]
        expiry = int(record["expiry_s"])
        return protocol.ChunkRow(
            key=bytes(record["key"]),
            namespace=bytes(record["namespace"]),
            layout=bytes(record["layout"]),
            segment=int(record["segment"]),
            offset=int(record["offset"]),
            length=int(record["length"]),
            idle_s=max(0, now_ns - int(record["used_ns"])) / NS,
            expires_s=expiry - now_ns / NS if expiry else None,
            pins=int(record["pins"]),
            leases=int(self.rights.leases[index]),
        )

    def _describe(self, mine: Holdings, rid: int, ask: protocol.Describe, now_ns: int) -> protocol.Reply:
        fits = len(ask.digest) <= limits.KEY_BYTES and len(ask.label) <= limits.LABEL_BYTES_MAX
        if not fits or (len(self.labels) >= limits.LABELS_MAX and ask.digest not in self.labels):
            raise Refusal(ErrorCode.LIMIT, "describe: too many names, or one too long")
        self.labels[ask.digest] = ask.label
        return protocol.Done()

    def gauges(self) -> dict[str, float]:
        """Counters since the start, and what there is now."""
        self.catch_up()
        holdings = self.rights.sessions.values()
        rooms = self.allocator.rooms.values()
        return {
            **{name: float(count) for name, count in self.counters.items()},
            "chunks": float(len(self.chunks)),
            "replicas": float(sum(map(len, self.replicas.values()))),
            "reservations": float(sum(len(each.reservations) for each in holdings)),
            "leases": float(sum(len(each.leases) for each in holdings)),
            "pins": float(sum(each.pinned_count for each in holdings)),
            "pinned_bytes": float(sum(each.pinned_bytes for each in holdings)),
            "capacity_bytes": float(sum(room.end - room.begin for room in rooms)),
            "used_bytes": float(sum(room.used_bytes for room in rooms)),
            "table_full": float(self.allocator.table_full),
        }

    def _pack(self, indices: Indices | list[int], length: Literal["size", "length"]) -> bytes:
        extents = np.zeros(len(indices), EXTENT)
        records = self.table.records[indices]
        extents["index"] = indices
        extents["generation"] = records["word"] >> np.uint64(32)
        for name, column in (("segment", "segment"), ("offset", "offset"), ("length", length)):
            extents[name] = records[column]
        return extents.tobytes()

    def _check(self, mine: Holdings, rid: int, ask: protocol.Check, now_ns: int) -> protocol.Reply:
        self.check()
        return protocol.Done()

    def check(self) -> None:
        """Prove that extents never overlap, that nothing leaks and that the table says what we believe."""
        self.catch_up()
        self.allocator.check()
        self.rights.check()
        free = {index for slab in self.allocator.slabs.values() for index in slab.free}
        bound = [index for key in self.chunks for index in self._replicas_of(key)]
        assert len(bound) == len(set(bound)), "an extent is bound twice"
        assert set(self.replicas) <= set(self.chunks)
        reserved = {
            index: (each.session, rid)
            for each in self.rights.sessions.values()
            for index, rid in each.reservations.items()
        }
        assert len(reserved) == sum(len(each.reservations) for each in self.rights.sessions.values()), (
            "an extent is reserved twice"
        )
        for index, owner in reserved.items():
            record = self.table.records[index]
            assert (record["session"], record["rid"]) == owner, f"extent {index} is another reservation"
            assert self.table.state(index) is State.RESERVED and self.allocator.in_slab(index)
        for slab in self.allocator.slabs.values():
            for index in slab.indices:
                state = self.table.state(index)
                assert (state is State.FREE) == (index in free), (
                    f"extent {index} is {state.name}, free={index in free}"
                )
                assert (state is State.RESERVED) == (index in reserved), f"extent {index} is {state.name}"
                pinned = bool(self.table.pins[index])
                assert state is not State.ORPHANED or pinned, f"extent {index} is orphaned and nobody pins it"
        for key in self.chunks:
            for index in self._replicas_of(key):
                assert self.table.state(index) is State.COMMITTED and self.table.key(index) == key
        assert sum(map(len, self._orders.values())) == len(bound), "the eviction order and the chunks differ"
        committed = sum(
            self.table.state(i) is State.COMMITTED for s in self.allocator.slabs.values() for i in s.indices
        )
        assert committed == len(bound), "a committed extent is not findable"


def _keys(packed: bytes) -> list[bytes]:
    keys = protocol.split_keys(packed)
    if len(keys) > limits.KEYS_PER_REQUEST_MAX:
        raise Refusal(ErrorCode.LIMIT, f"keys: got {len(keys)}, wanted at most {limits.KEYS_PER_REQUEST_MAX}")
    return keys


def _handles(packed: bytes) -> protocol.Handles:
    handles = protocol.unpack(packed, HANDLE)
    if len(handles) > limits.RESERVATIONS_PER_SESSION_MAX:
        wanted = f"wanted at most {limits.RESERVATIONS_PER_SESSION_MAX}"
        raise Refusal(ErrorCode.LIMIT, f"handles: got {len(handles)}, {wanted}")
    return handles
