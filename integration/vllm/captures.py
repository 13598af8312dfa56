"""Which chunks are stored: captured in the step that completes them, ordered once it has come back well."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.request import RequestStatus

from integration.vllm.events import StoredEvents
from integration.vllm.groups import Groups
from integration.vllm.keys import ChunkKeys
from integration.vllm.messages import Report, Save, SavePart
from integration.vllm.saves import Captured, PagePins, pages_of_chunk
from integration.vllm.tracked import Tracked
from vcache.engine.stats import Cause, Counters

Tables = Sequence[Sequence[int]]
"""vLLM's block tables of one request, one per KV group."""


class Captures:
    """Chunks of all requests on their way to the pool, with their pages pinned in vLLM.

    store: whether at all. store_generated: whether KV of generated tokens, too. ranks: that have to report.
    """

    def __init__(
        self,
        groups: Groups,
        keys: ChunkKeys,
        pins: PagePins,
        events: StoredEvents,
        counters: Counters,
        *,
        store: bool,
        store_generated: bool,
        ranks: int,
    ) -> None:
        self._groups = groups
        self._keys = keys
        self._pins = pins
        self._events = events
        self._counters = counters
        self._store = store
        self._store_generated = store_generated
        self._ranks = ranks
        self._ordered: list[Save] = []

    @property
    def busy(self) -> bool:
        """Whether a save is to be carried out, or to be reported."""
        return bool(self._ordered or self._pins.in_flight)

    def take_orders(self) -> list[Save]:
        """The saves that were ordered since the last call."""
        ordered, self._ordered = self._ordered, []
        return ordered

    def completed(self, tracked: Tracked, tokens: int) -> range:
        """Chunks to be captured once `tokens` tokens are computed. Only for these are its block tables
        needed, which vLLM copies when asked for them.
        """
        if tracked.barred or not self._store or not self._keys.complete:
            return range(0)
        request, groups = tracked.request, self._groups
        if not self._store_generated:
            tokens = min(tokens, request.num_prompt_tokens)
        end = min(tokens // groups.chunk_tokens, len(request.block_hashes) // groups.hashes_per_chunk)
        return range(tracked.captured_to, end)

    def capture(self, tracked: Tracked, chunks: range, tables: Tables, arriving: set[int]) -> None:
        """Pin the pages of these chunks, which `completed` gave.

        arriving: pages that loads under way fill.
        """
        if not chunks:
            return
        groups = self._groups
        of_groups = [tables[group.index] for group in groups]
        per_chunk = [group.pages_in(groups.chunk_tokens) for group in groups]
        taken: list[Captured] = []
        pages: list[int] = []
        for chunk in chunks:
            if chunk in tracked.loaded:
                continue
            captured = pages_of_chunk(chunk, of_groups, per_chunk)
            if captured is None:
                continue
            of_chunk = captured.page_ids()
            if not arriving.isdisjoint(of_chunk):  # another request loads it: it may fail, and is in the pool
                continue
            if not self._pins.room_for(len(pages) + len(of_chunk)):
                self._counters.failed(Cause.ASYNC_LIMIT, "too many blocks wait to be stored to store more")
                continue
            pages += of_chunk
            taken.append(captured)
        if pages:
            self._pins.pin(pages)
            tracked.captured += taken
        tracked.captured_to = chunks.stop

    def confirm(self, tracked: Tracked) -> None:
        """Order to store those captured chunks of which the steps that computed them came back well."""
        if not tracked.captured or not tracked.is_confirmed:
            return
        complete = tracked.processed // self._groups.chunk_tokens
        ready = [each for each in tracked.captured if each.chunk < complete]
        if not ready:
            return
        tracked.captured = [each for each in tracked.captured if each.chunk >= complete]
        pages = [page for each in ready for page in each.page_ids()]
        try:
            parts = self._parts(tracked, ready)
            note = self._events.note(tracked.request, [each.chunk for each in ready])
        except BaseException:  # nobody would ever report a save that is not ordered
            self._pins.unpin(pages)
            raise
        self._ordered.append(Save(self._pins.send(pages, self._ranks, note), parts))

    def confirm_all(self, requests: Iterable[Tracked]) -> None:
        """As `confirm`; what belongs to preempted requests is dropped, for others want its blocks."""
        for tracked in requests:
            if tracked.captured:
                if tracked.request.status == RequestStatus.PREEMPTED:
                    self.drop(tracked)
                else:
                    self.confirm(tracked)

    def drop(self, tracked: Tracked, *, since: int = 0) -> None:
        """What was captured from chunk `since` on and is not ordered yet is not stored."""
        dropped = [each for each in tracked.captured if each.chunk >= since]
        if dropped:
            tracked.captured = [each for each in tracked.captured if each.chunk < since]
            self._pins.unpin([page for each in dropped for page in each.page_ids()])

    def bar(self, tracked: Tracked) -> None:
        """Store nothing of it until it is admitted anew."""
        self.drop(tracked)
        tracked.barred = True

    def reported(self, report: Report) -> None:
        """Workers are through with saves."""
        for save, ranks in report.saves.items():
            job = self._pins.finish(save, ranks, report.stored.get(save, 0))
            if job is not None and job.stored >= self._ranks:
                self._events.stored(job.note)

    def take_events(self) -> list[Any]:
        """KV events since the last call."""
        return self._events.take()

    def _parts(self, tracked: Tracked, ready: Sequence[Captured]) -> tuple[SavePart, ...]:
        parts = []
        for at in range(len(self._groups)):
            of_group = [(each.chunk, pages) for each in ready if (pages := each.pages[at]) is not None]
            if not of_group:
                continue
            chunks = [chunk for chunk, _ in of_group]
            keys = self._keys.of_all_places(tracked.request.block_hashes, chunks, at, tracked.adapter)
            parts.append(SavePart(at, keys, tuple(page for _, pages in of_group for page in pages)))
        return tuple(parts)
