"""Pool and lower tiers → paged KV: acquire, scatter in place, and count a hit only if the fence held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from vcache.client import Grant, Reservation
from vcache.engine.arguments import Transfer
from vcache.engine.copies import Copies
from vcache.engine.lanes import PAST
from vcache.engine.layerwise import Progress
from vcache.engine.lower import LowerTiers
from vcache.engine.passages import Passage
from vcache.engine.pool import Pool
from vcache.engine.prefetch import Prefetch
from vcache.engine.promotion import Landing
from vcache.engine.stats import Cause, Counters
from vcache.limits import KEYS_PER_REQUEST_MAX, PREFETCH_WAIT_S, RETRIEVE_TRIES, TIER_LOAD_CHUNKS_MAX
from vcache.tiers import Found


class Retrieve:
    """Loads transfers. Thread-safe. prefetch: what may be loading chunks already; None: nothing does."""

    def __init__(
        self,
        pool: Pool,
        copies: Copies,
        lower: LowerTiers,
        counters: Counters,
        prefetch: Prefetch | None = None,
    ) -> None:
        self._prefetch = prefetch
        self._pool = pool
        self._copies = copies
        self._lower = lower
        self._counters = counters

    def run(self, transfer: Transfer, progress: Progress | None = None) -> int:
        """Load as many leading chunks as can be had; how many. The other chunks' pages hold anything.

        progress: load layer by layer, and tell it. When it returns, or raises, nothing touches the pages any
        more.
        """
        self._counters.add(retrieve_calls=1)
        with self._counters.seconds("retrieve_seconds"):
            loaded = self._load(transfer) if progress is None else self._load_by_layers(transfer, progress)
        sizes = transfer.sizes[:loaded]
        self._counters.add(
            hits=loaded,
            misses=len(transfer) - loaded,
            retrieved_chunks=loaded,
            retrieved_bytes=sum(sizes),
            retrieved_tokens=sum(map(transfer.tokens_in, sizes)),
        )
        return loaded

    def _load(self, transfer: Transfer) -> int:
        """Take turns between pool and tiers: what the pool evicted in the middle of a prefix may be below."""
        at = 0
        while at < len(transfer):
            part = transfer.part(at, at + KEYS_PER_REQUEST_MAX)
            found, has_more = self._load_from_pool(part)
            at += found
            if found < len(part) and not has_more:
                missing = part.keys[found]
                if self._prefetch is not None and self._prefetch.has_brought(missing, PREFETCH_WAIT_S):
                    continue
                from_tiers = _FromTiers(self._pool, self._copies, self._lower, self._counters).run(
                    part.part(found)
                )
                at += from_tiers
                if not from_tiers:
                    break
        return at

    def _load_from_pool(self, transfer: Transfer) -> tuple[int, bool]:
        """Load leading chunks that the pool has: how many, and whether the pool has more of them."""
        for _ in range(RETRIEVE_TRIES):
            grant = self._pool.acquire(transfer.keys)
            if grant is None or not len(grant.extents):
                return 0, False
            try:
                loaded, has_more = self._scatter(transfer, grant)
                if not loaded or self._pool.intact(grant, 0, loaded):
                    return loaded, has_more
            finally:
                self._pool.release(grant)
        return 0, False

    def _scatter(self, transfer: Transfer, grant: Grant) -> tuple[int, bool]:
        """Copy what was granted and is within reach: how many chunks, and whether there is more to copy."""
        with self._within_reach(transfer, grant) as (chunks, has_more):
            if chunks:
                self._copies.scatter(transfer.part(0, len(chunks)), chunks)
            return len(chunks), has_more

    @contextmanager
    def _within_reach(self, transfer: Transfer, grant: Grant) -> Iterator[tuple[list[Tensor], bool]]:
        """What was granted, up to the first chunk that is out of reach or has a wrong size.

        Also whether the chunk behind that is within reach: no more than TIER_LOAD_CHUNKS_MAX of host memory
        are brought to a GPU at once.
        """
        lengths = grant.extents["length"].tolist()
        fitting = next((at for at, size in enumerate(lengths) if size != transfer.sizes[at]), len(lengths))
        if fitting < len(lengths):
            got, wanted = lengths[fitting], transfer.sizes[fitting]
            self._counters.failed(Cause.MALFORMED, "a chunk has a wrong length", got=got, wanted=wanted)
        with self._pool.borrowed(grant.extents[:fitting], lengths[:fitting], grant.lineage) as views:
            chunks, has_more = self._readable(transfer, _leading(views))
            views.clear()
            try:
                yield chunks, has_more
            finally:
                chunks.clear()

    def _readable(self, transfer: Transfer, views: list[Tensor]) -> tuple[list[Tensor], bool]:
        """The views as copies on the paged KV's device can read them; whether there are more."""
        chunks: list[Tensor] = []
        kind, brought = transfer.paged.device.type, 0
        for view in views:
            if view.device.type == kind:
                chunks.append(view)
            elif kind != "cuda":
                self._counters.failed(Cause.OTHER_MEMORY, "a segment is on a GPU, and the pages are not")
                break
            elif brought == TIER_LOAD_CHUNKS_MAX:
                return chunks, True
            else:
                brought += 1
                chunks.append(self._copies.brought(transfer, view))
        return chunks, False

    def _load_by_layers(self, transfer: Transfer, progress: Progress) -> int:
        """Pin what the pool has, load what it lacks, and then layer by layer what is pinned."""
        pinned = transfer.part(0, KEYS_PER_REQUEST_MAX)
        grant = self._pool.acquire(pinned.keys, pin=True)
        if grant is None:
            loaded = self._load(transfer)
            progress.promise(loaded)
            return loaded
        try:
            with self._within_reach(pinned, grant) as (chunks, _):
                count = len(chunks)
                rest = self._load(transfer.part(count)) if count < len(transfer) else 0
                progress.promise(count + rest)
                if chunks:
                    self._launch_by_layers(transfer.part(0, count), chunks, progress)
            return count + rest if self._pool.intact(grant, 0, count) else 0
        finally:
            self._pool.release(grant)

    def _launch_by_layers(self, transfer: Transfer, chunks: list[Tensor], progress: Progress) -> None:
        """One launch for each range of layers; when it returns, or raises, nothing touches the pages any
        more.
        """
        last = PAST
        try:
            with self._counters.seconds("scatter_seconds"):
                for at, layers in enumerate(progress.ranges):
                    last = self._copies.scatter_layers(transfer, chunks, layers)
                    progress.launched(at, last)
        finally:
            last.wait()


class _FromTiers:
    """Loads leading chunks from the lower tiers and promotes them into the pool."""

    def __init__(self, pool: Pool, copies: Copies, lower: LowerTiers, counters: Counters) -> None:
        self._pool = pool
        self._copies = copies
        self._lower = lower
        self._counters = counters

    def run(self, transfer: Transfer) -> int:
        """Load at most TIER_LOAD_CHUNKS_MAX leading chunks that the pool lacks; how many came."""
        if not self._lower:
            return 0
        transfer = transfer.part(0, TIER_LOAD_CHUNKS_MAX)
        with self._lower.passages.opened(transfer.keys) as passage:
            return self._run(transfer, passage)

    def _run(self, transfer: Transfer, passage: Passage) -> int:
        flags = self._lower.contains(transfer.keys)
        transfer = transfer.part(0, flags.index(False) if False in flags else len(flags))
        if not len(transfer):
            return 0
        reservation = self._pool.reserve(transfer.keys)
        if reservation is None:
            return len(self._scatter(transfer, None, {}))
        return self._load_and_promote(transfer, reservation, passage)

    def _load_and_promote(self, transfer: Transfer, reservation: Reservation, passage: Passage) -> int:
        present = reservation.present
        # Chunks that the pool has are loaded from there, in the next turn: but the first it just failed to
        # give.
        transfer = transfer.part(0, present.index(True, 1) if True in present[1:] else len(present))
        missing = [at for at, there in enumerate(present) if not there and at < len(transfer)]
        sizes = [transfer.sizes[at] for at in missing]
        with Landing(self._pool, reservation, sizes, transfer.paged.device.type) as landing:
            views = zip(missing, landing.views, strict=False)
            extents = {at: extent for extent, (at, view) in enumerate(views) if view is not None}
            found = self._scatter(transfer, landing, extents)
            promoted = [at for at in range(len(found)) if at in extents]
            count = landing.promote(
                [extents[at] for at in promoted],
                [transfer.keys[at] for at in promoted],
                [found[at] for at in promoted],
                passage,
            )
        self._counters.add(tier_promoted_chunks=count)
        return len(found)

    def _scatter(
        self, transfer: Transfer, landing: Landing | None, extents: Mapping[int, int]
    ) -> list[Found]:
        """Read the chunks, up to the first that no tier has in time, and scatter them; what was found.

        extents: those of `landing` that chunks are read into; the others go into memory of their own.
        """
        found: list[Found] = []
        chunks: list[Tensor] = []
        for at, key in enumerate(transfer.keys):
            chunk = landing.views[extents[at]] if landing is not None and at in extents else None
            if landing is None or chunk is None:
                chunk = self._own_memory(transfer, at)
                answer = self._lower.read(key, chunk).found()
            else:
                answer = landing.read(self._lower, key, extents[at])
            if answer is None:
                break
            found.append(answer)
            chunks.append(chunk)
        if found:
            self._copies.scatter(transfer.part(0, len(found)), chunks)
        self._counters.add(tier_hits=len(found))
        return found

    def _own_memory(self, transfer: Transfer, at: int) -> Tensor:
        return torch.empty(transfer.sizes[at], dtype=torch.uint8, device=transfer.paged.device)


def _leading(views: list[Tensor | None]) -> list[Tensor]:
    """The views up to the first that is None."""
    leading = []
    for view in views:
        if view is None:
            break
        leading.append(view)
    return leading
