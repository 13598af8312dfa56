"""What is there, and the right to read it: lookup, contains, acquire, release, touch."""

from __future__ import annotations

from functools import partial
from typing import cast

import numpy as np

from metadata_server.chunks import handles_of, keys_of
from metadata_server.errors import Refusal
from metadata_server.rights import Holdings, Indices
from metadata_server.saving import Saving
from vcache import limits, protocol
from vcache.protocol import ErrorCode


class Reading(Saving):
    """The requests of those who load."""

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
        get, known = self.chunks.get, self._layouts.get(layout)
        if known is None:
            return [-1] * len(keys)
        places = [get(key, -1) for key in keys]
        if len(self._layouts) > 1:
            indices = np.array(places, np.intp)
            ours = (indices >= 0) & (self._layout_of[indices] == known)
            places = cast("list[int]", np.where(ours, indices, -1).tolist())
        return places

    def _lookup(self, mine: Holdings, rid: int, ask: protocol.Lookup, now_ns: int) -> protocol.Reply:
        keys = keys_of(ask.keys)
        self.counters["looked_up"] += len(keys)
        if ask.bitmap:
            flags = bytes(index >= 0 for index in self._flags(keys, ask.layout))
            return protocol.Found((flags + b"\0").index(0), flags)
        return protocol.Found(len(self._find(keys, ask.layout)))

    def _contains(self, mine: Holdings, rid: int, ask: protocol.Contains, now_ns: int) -> protocol.Reply:
        flags = bytes(key in self.chunks for key in keys_of(ask.keys))
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
        keys = keys_of(ask.keys)
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
        self._offer_up(indices, ask.near, now_ns)
        if ask.pin:
            self._unbooked = partial(self._use, indices[::-1], now_ns)
            indices, flags, nbytes = self._within_quota(mine, indices, flags)
            if len(indices):
                self.rights.pin(mine, rid, indices, self.rights.generations(indices), nbytes)
        elif len(indices):
            self._unbooked = partial(self._lease, mine, rid, indices, now_ns)
        extents = self._grants.take(indices).tobytes()
        return protocol.Acquired(extents, flags, 0 if ask.pin else self.policy.lease_ms)

    def _nearest(self, index: int, near: int) -> int:
        for replica in self.replicas.get(self.table.key(index), ()):
            same_layout = self._layout_of[replica] == self._layout_of[index]
            if self.table.segment[replica] == near and self.table.segment[index] != near and same_layout:
                return replica
        return index

    def _within_quota(self, mine: Holdings, indices: Indices, flags: bytes) -> tuple[Indices, bytes, int]:
        """The leading ones that this session may still pin, and their bytes; what does not fit is a miss."""
        left = self.policy.pinned_bytes_max - mine.pinned_bytes
        count_left = limits.PINNED_EXTENTS_PER_SESSION_MAX - mine.pinned_count
        sizes = self.table.records["size"][indices]
        nbytes = int(sizes.sum(dtype=np.int64))
        if nbytes <= left and len(indices) <= count_left:
            return indices, flags, nbytes
        fits = int(np.searchsorted(np.cumsum(sizes, dtype=np.int64), left, "right"))
        fits = max(0, min(fits, count_left))
        self.counters["pin_quota_misses"] += len(indices) - fits
        there = np.flatnonzero(np.frombuffer(flags, np.uint8))
        if len(there):
            flags = flags[: int(there[fits])] + bytes(len(flags) - int(there[fits]))
        return indices[:fits], flags, int(sizes[:fits].sum(dtype=np.int64))

    def _release(self, mine: Holdings, rid: int, ask: protocol.Release, now_ns: int) -> protocol.Reply:
        self.rights.end_lease(mine, ask.right)
        part = dict(handles_of(ask.handles).tolist()) if ask.handles else None
        self._unpinned(self.rights.unpin(mine, ask.right, part))
        return protocol.Done()

    def _touch(self, mine: Holdings, rid: int, ask: protocol.Touch, now_ns: int) -> protocol.Reply:
        found = [self.chunks[key] for key in keys_of(ask.keys) if key in self.chunks]
        self._use(np.array(found[::-1], np.intp), now_ns)
        return protocol.Done(len(found))
