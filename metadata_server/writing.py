"""The right to write: reserve, commit, abort."""

from __future__ import annotations

import numpy as np

from metadata_server.allocator import extent_size
from metadata_server.chunks import NS, handles_of, keys_of
from metadata_server.errors import Refusal
from metadata_server.moving import Moving
from metadata_server.rights import Holdings
from vcache import limits, protocol
from vcache.protocol import HANDLE, ErrorCode, Outcome


class Writing(Moving):
    """The requests of those who store."""

    def _reserve(self, mine: Holdings, rid: int, ask: protocol.Reserve, now_ns: int) -> protocol.Reply:
        if len(ask.layout) != limits.FINGERPRINT_BYTES or not 0 < ask.size <= limits.CHUNK_BYTES_MAX:
            raise Refusal(
                ErrorCode.ARGUMENT, f"reserve: size {ask.size} or a layout of {len(ask.layout)} bytes"
            )
        keys = keys_of(ask.keys)
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
        size, keep = extent_size(ask.size), set(present)
        granted, coming = self._allocate(wanted, size, ask.near, keep, now_ns, patient=ask.patient)
        for index in granted:
            self.table.reserve(index, mine.session, rid, ask.layout)
            mine.reservations[index] = rid
        if granted:
            self._layout_of[granted] = self._layout_number(ask.layout)
            mine.remember_head(rid, indices, self.rights.generations(indices))
        self.counters["reserved"] += len(granted)
        self.counters["unfitted"] += 0 if coming else wanted - len(granted)
        flags = bytes(index is not None for index in there)
        return protocol.Reserved(self._pack(np.array(granted, np.intp), "size"), flags, wanted, coming)

    def _commit(self, mine: Holdings, rid: int, ask: protocol.Commit, now_ns: int) -> protocol.Reply:
        handles = protocol.unpack(ask.handles, HANDLE)
        keys = keys_of(ask.keys)
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

    def _abort(self, mine: Holdings, rid: int, ask: protocol.Abort, now_ns: int) -> protocol.Reply:
        count = 0
        for index, generation in handles_of(ask.handles).tolist():
            if index in mine.reservations and self.table.generation(index) == generation:
                self._give_up(mine, index)
                count += 1
        return protocol.Done(count)
