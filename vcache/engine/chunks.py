"""Chunks that say themselves what tensors they hold, for applications with keys and memory of their own kind.

What `VCacheEngine` is for paged KV, `Chunks` is for a cache layer such as LMCache: it hands out memory of the
pool to be written, binds it to keys afterwards, and hands out chunks to be read in place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vcache.client import Client
from vcache.engine.forms import Form, decode
from vcache.engine.holds import Hold, Holds
from vcache.engine.lower import LowerTiers, ttl_left_ms
from vcache.engine.passages import Passage
from vcache.engine.pool import Pool
from vcache.engine.stats import Cause, Counters
from vcache.engine.stock import Blank, Stock
from vcache.engine.tier_queue import TierQueues
from vcache.engine.write_back import WriteBack
from vcache.errors import RemoteProtocolError
from vcache.layout import KVLayout
from vcache.limits import FORM_BYTES, KEYS_PER_REQUEST_MAX, TIER_LOAD_CHUNKS_MAX
from vcache.protocol import EXTENT, Outcome
from vcache.segment.pinning import Registrar
from vcache.tiers import Tier


class Draft:
    """A chunk that is being written: parts are written, then put under a key, then freed, in any order.

    The chunk can be committed when all parts were put, and its extent is free again when all were freed.
    """

    def __init__(self, form: Form, blank: Blank) -> None:
        self.form = form
        self.blank = blank
        self.key = b""
        self.unput = set(range(form.parts))
        self.unfreed = set(range(form.parts))
        self.ours = True

    def part(self, index: int) -> Tensor:
        """The bytes of one part, to be written; not after it was freed."""
        return self.form.part(self.blank.chunk, index)


class Part(NamedTuple):
    """One part of a draft, as it is put."""

    draft: Draft
    number: int
    key: bytes


class Chunks:
    """One application's chunks in the pool and the tiers below. Thread-safe.

    Raises only EngineClosed and ForkedProcess: whatever else goes wrong is a miss, or a chunk that is not
    stored, counted and logged.
    """

    def __init__(
        self,
        client: Client,
        *,
        layout: KVLayout,
        model: str,
        device: str,
        counters: Counters,
        tiers: Sequence[Tier] = (),
        tier_queue_chunks: int = 1,
        tier_deadline_s: float = 10.0,
        ttl_s: float = 0.0,
        write_back: bool = False,
        synchronise: Callable[[], None] = lambda: None,
        registrar: Registrar | None = None,
    ) -> None:
        """synchronise: waits until what was launched into drafts has really been written. tier_deadline_s,
        ttl_s, write_back: `tiers.deadline_ms`, `server.default_ttl_s` and `tiers.policy` of the
        configuration.

        registrar: makes host memory reachable for the application's GPU; where it cannot, chunks are misses.
        """
        self.counters = counters
        self._pool = Pool(client, counters, layout, model, device, registrar)
        self._synchronise = synchronise
        self._stock = Stock(self._pool, synchronise)
        self._holds = Holds(self._pool)
        self._guard = threading.Lock()
        self._drafts = 0
        self._lower = LowerTiers(tiers, layout.fingerprint, counters, deadline_s=tier_deadline_s)
        self._queue: TierQueues | None = None
        self._is_saving = bool(tiers) and write_back
        with ExitStack() as made:
            made.callback(self._stock.drain)
            made.callback(self._lower.close)
            if tiers:
                self._queue = TierQueues(self._pool, self._lower, tier_queue_chunks, counters, ttl_s=ttl_s)
                made.callback(self._queue.close)
                if write_back:
                    made.callback(WriteBack(client, self._queue).close)
            self._made = made.pop_all()

    # -- writing

    def draft(self, form: Form, count: int) -> list[Draft]:
        """Memory for `count` chunks of that form, to be written; fewer if the pool has no room.

        Raises ArgumentError for a form that cannot be.
        """
        end = torch.frombuffer(bytearray(form.encode()), dtype=torch.uint8)
        drafts = [Draft(form, blank) for blank in self._stock.take(count, form.chunk_bytes)]
        for draft in drafts:
            draft.blank.chunk[-FORM_BYTES:].copy_(end)
        with self._guard:
            self._drafts += len(drafts)
        if len(drafts) < count:
            self.counters.add(unstored_chunks=count - len(drafts))
        return drafts

    def put(self, parts: Iterable[Part]) -> None:
        """These parts are written; chunks of which that was the last one are committed before the return."""
        ready = [draft for part in parts if (draft := self._put(part)) is not None]
        if ready:
            self._synchronise()
        for begin in range(0, len(ready), KEYS_PER_REQUEST_MAX):
            self._commit(ready[begin : begin + KEYS_PER_REQUEST_MAX])

    def free(self, draft: Draft, index: int) -> None:
        """Nobody here touches that part any more; freeing it again does nothing."""
        with self._guard:
            if index not in draft.unfreed:
                return
            draft.unfreed.discard(index)
            if draft.unfreed:
                return
            blank, ours = draft.blank, draft.ours
            del draft.blank
            self._drafts -= 1
        if ours:
            self._stock.give_back(blank)
        else:
            blank.let_go()

    def _put(self, part: Part) -> Draft | None:
        """Note one part; the draft if it is complete with it."""
        draft = part.draft
        with self._guard:
            draft.key = draft.key or part.key
            if draft.key != part.key or part.number not in draft.unput:
                return None  # parts of one chunk under two keys, or one part twice: never committed
            draft.unput.discard(part.number)
            return None if draft.unput else draft

    def _commit(self, drafts: list[Draft]) -> None:
        keys = [draft.key for draft in drafts]
        sizes = [draft.form.chunk_bytes for draft in drafts]
        extents = np.concatenate([draft.blank.extents for draft in drafts]).astype(EXTENT, copy=False)
        for draft in drafts:
            draft.ours = False
        outcomes = self._pool.commit(extents, keys, sizes, drafts[0].blank.lineage, keep_lost=True)
        stored = [at for at, outcome in enumerate(outcomes) if outcome == Outcome.COMMITTED]
        for draft, outcome in zip(drafts, outcomes, strict=False):
            draft.ours = outcome == Outcome.LOST
        lost, stale = outcomes.count(Outcome.LOST), outcomes.count(Outcome.STALE)
        self.counters.add(
            stored_chunks=len(stored),
            stored_bytes=sum(sizes[at] for at in stored),
            present_chunks=lost,
            unstored_chunks=len(drafts) - len(stored) - lost,
        )
        if stale:
            self.counters.failed(Cause.STALE, "extents were taken back before the commit", chunks=stale)
        if self._queue is not None and not self._is_saving and stored:
            self._queue.accept([keys[at] for at in stored])

    # -- looking

    def count(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are in the pool or below; holds nothing."""
        found = 0
        while found < len(keys):
            part = keys[found : found + KEYS_PER_REQUEST_MAX]
            there = self._pool.lookup(part)
            if there < len(part) and self._lower:
                flags = self._pool.contains(part[there:])
                below = self._lower.contains(part[there:])
                either = [pool or tier for pool, tier in zip(flags, below, strict=True)]
                there += either.index(False) if False in either else len(either)
            found += there
            if there < len(part):
                break
        return found

    def present(self, keys: Sequence[bytes]) -> list[bool]:
        """Of each key, whether the pool has it."""
        flags: list[bool] = []
        for begin in range(0, len(keys), KEYS_PER_REQUEST_MAX):
            flags += self._pool.contains(keys[begin : begin + KEYS_PER_REQUEST_MAX])
        return flags

    def lease(self, keys: Sequence[bytes]) -> int:
        """As `count`, and what is in the pool stays there for the time of a lease."""
        for begin in range(0, len(keys), KEYS_PER_REQUEST_MAX):
            grant = self._pool.acquire(keys[begin : begin + KEYS_PER_REQUEST_MAX])
            if grant is None or len(grant.extents) < min(KEYS_PER_REQUEST_MAX, len(keys) - begin):
                break
        return self.count(keys)

    # -- reading

    def take(self, keys: Sequence[bytes], expected_bytes: int = 0) -> list[Hold | None]:
        """Hold each chunk that is there, as often as it is named; give each back with `drop`.

        expected_bytes: of a chunk in the lower tiers, from which it is promoted; others stay there.
        """
        holds = self._holds.take(keys)
        if self._lower and expected_bytes and None in holds:
            missing = [key for key, hold in zip(keys, holds, strict=True) if hold is None]
            wanted = list(dict.fromkeys(missing))
            with self._lower.passages.opened(wanted) as passage:
                self._promote(wanted, expected_bytes, passage)
            promoted = iter(self._holds.take(missing))
            holds = [next(promoted) if hold is None else hold for hold in holds]
        found = sum(hold is not None for hold in holds)
        self.counters.add(
            hits=found,
            misses=len(keys) - found,
            retrieved_chunks=found,
            retrieved_bytes=sum(hold.chunk.numel() for hold in holds if hold is not None),
        )
        return holds

    def take_prefix(self, keys: Sequence[bytes], expected_bytes: int = 0) -> list[Hold]:
        """As `take`, but only the leading ones that are there."""
        holds = self.take(keys, expected_bytes)
        leading = holds.index(None) if None in holds else len(holds)
        self.drop_all(holds[leading:])
        return [hold for hold in holds[:leading] if hold is not None]

    def again(self, hold: Hold) -> Hold:
        """Hold a chunk that is held once more."""
        return self._holds.again(hold)

    def drop(self, hold: Hold) -> None:
        """Let go of a hold, once; from any thread."""
        self._holds.drop(hold)

    def drop_all(self, holds: Iterable[Hold | None]) -> None:
        """Let go of each, once."""
        self._holds.drop_all(holds)

    def forms(self, holds: Sequence[Hold]) -> list[Form | None]:
        """What tensors each chunk holds; None for one that does not say it."""
        ends = [hold.chunk[-FORM_BYTES:] for hold in holds]
        on_gpu = [at for at, end in enumerate(ends) if end.device.type != "cpu"]
        if on_gpu:  # one copy over the bus, not one for each
            for at, end in zip(on_gpu, torch.stack([ends[at] for at in on_gpu]).cpu(), strict=True):
                ends[at] = end
        forms: list[Form | None] = []
        for hold, end in zip(holds, ends, strict=True):
            try:
                forms.append(decode(end.numpy().tobytes(), hold.chunk.numel()))
            except RemoteProtocolError as error:
                self.counters.failed(Cause.MALFORMED, error)
                forms.append(None)
        return forms

    def _promote(self, keys: list[bytes], size: int, passage: Passage) -> None:
        """Load chunks of that size from the lower tiers into the pool, as far as they are there and fit."""
        flags = self._lower.contains(keys)
        below = [key for key, there in zip(keys, flags, strict=True) if there]
        for begin in range(0, len(below), TIER_LOAD_CHUNKS_MAX):
            blanks = self._stock.take(len(below[begin : begin + TIER_LOAD_CHUNKS_MAX]), size)
            loaded: list[tuple[bytes, Blank, int]] = []
            for key, blank in zip(below[begin:], blanks, strict=False):
                read = self._lower.read(key, blank.chunk)
                found = read.found()
                if found is not None:
                    loaded.append((key, blank, ttl_left_ms(found)))
                else:  # a tier's call may still write to it
                    read.when_over(partial(self._stock.give_back, blank))
            for ttl_ms, which in groupby(loaded, key=itemgetter(2)):
                self._bind([(key, blank) for key, blank, _ in which], size, ttl_ms, passage)
            if len(blanks) < TIER_LOAD_CHUNKS_MAX:
                return

    def _bind(self, loaded: list[tuple[bytes, Blank]], size: int, ttl_ms: int, passage: Passage) -> None:
        self._synchronise()
        outcomes = b""
        with passage.ending() as forgotten:
            kept = [blank for key, blank in loaded if key not in forgotten]
            if kept:
                keys = [key for key, _ in loaded if key not in forgotten]
                extents = np.concatenate([blank.extents for blank in kept]).astype(EXTENT, copy=False)
                sizes, lineage = [size] * len(keys), kept[0].lineage
                outcomes = self._pool.commit(extents, keys, sizes, lineage, ttl_ms=ttl_ms, keep_lost=True)
        for at, blank in enumerate(kept):
            if at < len(outcomes) and outcomes[at] == Outcome.LOST:
                self._stock.give_back(blank)
            else:
                blank.let_go()
        for key, blank in loaded:
            if key in forgotten:
                self._stock.give_back(blank)
        self.counters.add(tier_hits=len(kept), tier_promoted_chunks=outcomes.count(Outcome.COMMITTED))

    # -- forgetting, and the rest

    def remove(self, keys: Sequence[bytes]) -> int:
        """Forget chunks; how many were there. Who holds one goes on reading it."""
        with self._lower.passages.closed(keys):
            if self._queue is not None:
                self._queue.forget(keys)
            removed = self._pool.remove(keys)
            self._lower.remove(keys)
        return removed

    def clear(self) -> int:
        """Forget all chunks of this model, and of every model in the tiers; how many the pool had."""
        with self._lower.passages.closed(None):
            if self._queue is not None:
                self._queue.forget(None)
            removed = self._pool.clear()
            self._lower.clear()
        return removed

    @property
    def drafts(self) -> int:
        """Chunks that are being written now."""
        return self._drafts

    @property
    def held(self) -> int:
        """Chunks that are being read now."""
        return len(self._holds)

    @property
    def stocked(self) -> int:
        """Extents that wait to be written."""
        return self._stock.extents

    @property
    def tier_waiting(self) -> int:
        """Chunks that wait for a lower tier."""
        return 0 if self._queue is None else self._queue.chunks

    def capacity_bytes(self) -> int:
        """Bytes of the whole pool; 0 if that is not known now."""
        return self._pool.capacity_bytes()

    def drain(self) -> None:
        """Give what nobody writes to back to the server."""
        self._stock.drain()

    def flush_tiers(self, timeout_s: float) -> bool:
        """Wait until all that was stored is written below, too; whether it is."""
        return self._queue is None or self._queue.flush(timeout_s)

    def close(self) -> None:
        """End what runs in the background and give the stock back. The client stays the caller's to close."""
        self._made.close()
