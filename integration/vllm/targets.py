"""Which pages a range of tokens fills, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from integration.vllm.groups import Groups
from integration.vllm.saves import NULL_PAGE

UNWRITTEN = -1
"""Stands for a page that is not to be written."""


class Targets:
    """The pages of tokens `begin` … `end` - 1 in a request's block tables (one per KV group).

    chunks: those that the tokens lie in.
    """

    def __init__(self, groups: Groups, tables: Sequence[Sequence[int]], begin: int, end: int) -> None:
        size = groups.chunk_tokens
        self.chunks = range(begin // size, -(-end // size))
        self._per_chunk = [group.pages_in(size) for group in groups]
        self._pages: list[list[int]] = []
        self._wanted: list[int] = []
        for group, count in zip(groups, self._per_chunk, strict=True):
            table, tokens = tables[group.index], group.page_tokens
            first, last = begin // tokens, -(-end // tokens)
            wanted = [page or UNWRITTEN for page in table[first:last]]
            self._wanted.append(sum(page >= 0 for page in wanted))
            wanted += [UNWRITTEN] * (last - first - len(wanted))
            if begin % tokens and wanted:  # it has tokens that are computed already
                wanted[0] = UNWRITTEN
            before = first - self.chunks.start * count
            after = len(self.chunks) * count - before - len(wanted)
            self._pages.append([UNWRITTEN] * before + wanted + [UNWRITTEN] * after)

    def of(self, group: int, chunk: int) -> list[int]:
        """The pages of one chunk in a group, UNWRITTEN where there is none."""
        count = self._per_chunk[group]
        at = (chunk - self.chunks.start) * count
        return self._pages[group][at : at + count] if chunk in self.chunks else [UNWRITTEN] * count

    def written(self, group: int, chunks: Iterable[int]) -> tuple[list[int], list[int]]:
        """Those of these chunks that have pages to write, and the pages of them all."""
        kept, pages = [], []
        for chunk in chunks:
            of_chunk = self.of(group, chunk)
            if max(of_chunk) >= 0:
                kept.append(chunk)
                pages += of_chunk
        return kept, pages

    def wanted(self, group: int) -> int:
        """How many of a group's pages have some of the tokens."""
        return self._wanted[group]

    def since(self, chunk: int) -> set[int]:
        """All pages of this chunk and of later ones, in all groups."""
        found: set[int] = set()
        for pages, count in zip(self._pages, self._per_chunk, strict=True):
            found.update(pages[max(0, chunk - self.chunks.start) * count :])
        return found - {UNWRITTEN}


assert NULL_PAGE == 0, "`page or UNWRITTEN` takes the null page for one that is not written"
