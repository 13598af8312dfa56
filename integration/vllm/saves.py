"""Chunks on their way to the pool, as the scheduler sees them: their pages stay pinned until all ranks are
through.

A chunk is captured in the step that completes it, when its pages are in the block table for sure. It is sent
to the workers when the step's output has come back: a load that failed, in whatever rank, has been reported
by then, and nothing that was computed upon it is stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

NULL_PAGE = 0
"""vLLM's block 0 stands for pages that are not kept (out of a window)."""


@dataclass(frozen=True)
class Captured:
    """One chunk: its number, the pages of each group (None for a group that has not all of them)."""

    chunk: int
    pages: tuple[tuple[int, ...] | None, ...]

    def page_ids(self) -> list[int]:
        """All of them."""
        return [page for pages in self.pages if pages is not None for page in pages]


@dataclass
class InFlight:
    """A save that workers carry out: its pages, and how many ranks have still to report."""

    pages: list[int]
    ranks: int
    stored: int = 0
    note: Any = None


def pages_of_chunk(
    chunk: int, tables: Sequence[Sequence[int]], pages_per_chunk: Sequence[int]
) -> Captured | None:
    """The chunk's pages in the block tables (one per group); None if no group has all of them."""
    pages: list[tuple[int, ...] | None] = []
    for table, count in zip(tables, pages_per_chunk, strict=True):
        part = tuple(table[chunk * count : (chunk + 1) * count])
        pages.append(part if len(part) == count and NULL_PAGE not in part else None)
    return Captured(chunk, tuple(pages)) if any(part is not None for part in pages) else None


@dataclass
class PagePins:
    """Keeps vLLM from giving pages to anybody else. block_pool: vLLM's; None until it is bound.

    share_max: of all blocks, the part that may be pinned at once.
    """

    share_max: float
    block_pool: Any = None
    pinned: int = 0
    _pins: Counter[int] = field(default_factory=Counter)
    _jobs: dict[int, InFlight] = field(default_factory=dict)
    _last: int = 0

    @property
    def frees_blocks(self) -> bool:
        """Whether a page is pinned that nobody has but we: it is free again once it is unpinned."""
        blocks = () if self.block_pool is None else self.block_pool.blocks
        return any(blocks[page].ref_cnt == pins for page, pins in self._pins.items())

    def room_for(self, pages: int) -> bool:
        """Whether so many more may be pinned."""
        return self.block_pool is not None and (
            self.pinned + pages <= self.share_max * self.block_pool.num_gpu_blocks
        )

    def pin(self, pages: Sequence[int]) -> None:
        """Nobody else gets these."""
        self.pinned += len(pages)
        self._pins.update(pages)
        self.block_pool.touch([self.block_pool.blocks[page] for page in pages])

    def unpin(self, pages: Iterable[int]) -> None:
        """As before; the last ones are reused first, so that prefixes stay."""
        pages = list(pages)
        self.pinned -= len(pages)
        for page in pages:
            self._pins[page] -= 1
            if not self._pins[page]:
                del self._pins[page]
        blocks = [self.block_pool.blocks[page] for page in pages]
        self.block_pool.free_blocks(reversed(blocks))

    def uncache(self, pages: set[int]) -> None:
        """vLLM's own prefix cache finds these no more; whoever has them keeps them."""
        if pages and self.block_pool is not None:
            self.block_pool.evict_blocks(pages)

    def send(self, pages: list[int], ranks: int, note: Any = None) -> int:
        """These pinned pages are read by `ranks` ranks now; the number of the save."""
        self._last += 1
        self._jobs[self._last] = InFlight(pages, ranks, note=note)
        return self._last

    def finish(self, save: int, ranks: int, stored: int) -> InFlight | None:
        """So many ranks are through, and of so many the pool has all of it; the save, once all are."""
        job = self._jobs.get(save)
        if job is None:
            return None
        job.ranks -= ranks
        job.stored += stored
        if job.ranks > 0:
            return None
        del self._jobs[save]
        self.unpin(job.pages)
        return job

    @property
    def in_flight(self) -> int:
        """Saves that some rank has not reported yet."""
        return len(self._jobs)
