"""Loads: ordered when vLLM has allocated blocks, held until all ranks have reported; and what failed."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from integration.vllm.captures import Captures, Tables
from integration.vllm.groups import Groups
from integration.vllm.keys import ChunkKeys
from integration.vllm.messages import Load, LoadPart, Place, Report
from integration.vllm.saves import NULL_PAGE, PagePins
from integration.vllm.search import Pinned
from integration.vllm.stats import Observed
from integration.vllm.targets import Targets
from integration.vllm.tracked import Tracked
from vcache.logs import Line

_log = logging.getLogger("vcache.integration.vllm")

_FAILED_MISS_S = 30.0
"""How long a chunk that failed to load counts as a miss for all requests: what ails a holder lasts a while.
"""

_FAILED_MAX = 65_536
"""Chunks remembered as such."""


class Failures:
    """Chunks that did not arrive lately, by block hash, the longest ago first."""

    def __init__(self) -> None:
        self._failed: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._failed)

    def note(self, chunk_hash: bytes) -> None:
        """It did not arrive."""
        self._failed[chunk_hash] = time.monotonic()
        self._failed.move_to_end(chunk_hash)
        while len(self._failed) > _FAILED_MAX:
            self._failed.popitem(last=False)

    def first(self, groups: Groups, request: Any, chunks: range) -> int:
        """The first of these chunks of a request that counts as a miss; the end if none does."""
        expired_s = time.monotonic() - _FAILED_MISS_S
        while self._failed and next(iter(self._failed.values())) <= expired_s:
            self._failed.popitem(last=False)
        if not self._failed:  # as nearly always: no hash need be looked at
            return chunks.stop
        return next(
            (chunk for chunk in chunks if groups.hash_of(request, chunk) in self._failed), chunks.stop
        )


@dataclass
class _Loading:
    """A load that workers carry out, under a pin. tokens: that it brings.

    sharers: of other requests that have hit some of its pages in vLLM's own prefix cache, the pages from the
    first such one on.
    """

    tracked: Tracked
    pinned: Pinned
    ranks: int
    targets: Targets
    tokens: range
    failed: int | None = None
    sharers: dict[str, set[int]] = field(default_factory=dict)


class Loads:
    """The loads of all requests. is_async: whether they run beside steps, or within the one that needs them.

    ranks: that have to report.
    """

    def __init__(
        self,
        groups: Groups,
        keys: ChunkKeys,
        pins: PagePins,
        captures: Captures,
        observed: Observed,
        *,
        is_async: bool,
        ranks: int,
    ) -> None:
        self._groups = groups
        self._keys = keys
        self._pins = pins
        self._captures = captures
        self._observed = observed
        self.is_async = is_async
        self._ranks = ranks
        self._running: dict[int, _Loading] = {}
        self._last = 0
        self._ordered: list[Load] = []
        self.failures = Failures()

    def __bool__(self) -> bool:
        return bool(self._running)

    def take_orders(self) -> list[Load]:
        """The loads that were ordered since the last call."""
        ordered, self._ordered = self._ordered, []
        return ordered

    def arriving(self) -> set[int]:
        """All pages that loads under way fill."""
        return {page for loading in self._running.values() for page in loading.targets.since(0)}

    def order(self, tracked: Tracked, pinned: Pinned, tables: Tables, tokens: range) -> None:
        """vLLM has given a request blocks for these tokens: load them. It counts on them from now on."""
        targets = Targets(self._groups, tables, tokens.start, tokens.stop)
        self._last += 1
        parts = self._parts_or_failure(pinned, targets)
        load = Load(self._last, tracked.request.request_id, self.is_async, pinned.hit.lineage, parts)
        self._running[load.id] = _Loading(tracked, pinned, self._ranks, targets, tokens)
        self._ordered.append(load)
        size = self._groups.chunk_tokens
        tracked.loaded = range(tokens.start // size, tokens.stop // size)

    def note_sharers(self, step: Any, tracked: dict[str, Tracked]) -> None:
        """Whoever hits blocks that are being loaded within the step computes upon them, too: those that are
        admitted with it. tracked: all requests that there are, but for those that use no pool.
        """
        if self.is_async or not self._running:  # those of asynchronous loads cannot be hit before the end
            return
        filled = [(loading, loading.targets.since(0)) for loading in self._running.values()]
        for request_id in step.num_scheduled_tokens:
            known = tracked.get(request_id)
            if known is not None and known.first_scheduled:  # it was admitted before
                continue
            tables = step.kv_connector_block_state.get_block_ids(request_id) or ()
            for loading, pages in filled:
                for group in self._groups if tables else ():
                    table = tables[group.index]
                    first = next((at for at, page in enumerate(table) if page in pages), len(table))
                    if first < len(table):
                        loading.sharers.setdefault(request_id, set()).update(table[first:])

    def reported(self, report: Report, tracked: dict[str, Tracked]) -> None:
        """Workers are through with loads. tracked: all requests that there are."""
        for load, ranks in report.loads.items():
            loading = self._running.get(load)
            if loading is None:
                continue
            loading.ranks -= ranks
            failed = report.failed.get(load)
            if failed is not None:
                loading.failed = failed if loading.failed is None else min(failed, loading.failed)
                self._remember(loading.tracked, failed)
                self._forget_unfilled(loading, failed, tracked)
            if loading.ranks <= 0:
                del self._running[load]
                self._ended(loading)

    def _ended(self, loading: _Loading) -> None:
        loading.pinned.release()
        end = loading.tokens.stop
        if loading.failed is not None:
            # Of an asynchronous one vLLM takes all or nothing.
            came = 0 if self.is_async else loading.failed * self._groups.chunk_tokens
            end = min(end, max(loading.tokens.start, came))
            self._observed.add(failed_loads=1)
            request = loading.tracked.request.request_id
            _log.warning(Line("a load failed", request=request, chunk=loading.failed))
        self._observed.add(hit_tokens=end - loading.tokens.start)

    def _remember(self, tracked: Tracked, chunk: int) -> None:
        """A chunk did not arrive: from it on nothing is loaded for this request, nor soon for others."""
        if chunk < len(tracked.request.block_hashes) // self._groups.hashes_per_chunk:
            self.failures.note(self._groups.hash_of(tracked.request, chunk))
        tracked.limit = chunk if tracked.limit is None else min(chunk, tracked.limit)
        start, stop = tracked.loaded.start, tracked.loaded.stop
        tracked.loaded = range(start, max(start, min(chunk, stop)))
        tracked.captured_to = min(tracked.captured_to, chunk)
        self._captures.drop(tracked, since=chunk)

    def _forget_unfilled(self, loading: _Loading, chunk: int, tracked: dict[str, Tracked]) -> None:
        """Nobody finds in vLLM's own prefix cache what a load did not fill, or what was computed upon it, and
        nothing of those who did is stored. (vLLM looks after its running requests, not after aborted ones.)
        """
        if self.is_async:
            return
        pages = loading.targets.since(chunk)
        for request_id, shared in loading.sharers.items():
            if shared.isdisjoint(pages):
                continue
            pages = pages | shared - loading.targets.since(0)
            sharer = tracked.get(request_id)
            if sharer is not None and sharer is not loading.tracked:
                self._captures.bar(sharer)
        self._pins.uncache(pages - {NULL_PAGE})

    # -- what is to be loaded

    def _parts_or_failure(self, pinned: Pinned, targets: Targets) -> dict[Place, tuple[LoadPart, ...]]:
        """vLLM counts on it by now: what cannot be said right is ordered to fail."""
        places, groups = self._keys.identities, range(len(self._groups))
        try:
            return {place: tuple(_part(pinned, place, at, targets) for at in groups) for place in places}
        except Exception:
            _log.exception("a load cannot be ordered")
            failing = tuple(_failing(at, targets) for at in groups)
            return dict.fromkeys(places, failing)


def _part(pinned: Pinned, place: Place, group: int, targets: Targets) -> LoadPart:
    chunks, pages = targets.written(group, pinned.hit.chunks(place, group))
    missing = targets.wanted(group) != sum(page >= 0 for page in pages)
    return LoadPart(group, tuple(chunks), tuple(pages), pinned.hit.extents(place, group, chunks), missing)


def _failing(group: int, targets: Targets) -> LoadPart:
    pages: Sequence[int] = [page for chunk in targets.chunks for page in targets.of(group, chunk)]
    return LoadPart(group, tuple(targets.chunks), tuple(pages), b"", True)
