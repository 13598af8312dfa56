"""Which pages a range of tokens fills: as a definition says it, token by token."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from integration.vllm.groups import Group, Groups
from integration.vllm.targets import UNWRITTEN, Targets

HASH = 16


def naive(page_tokens: int, table: list[int], chunk: int, size: int, begin: int, end: int) -> list[int]:
    """Of one chunk, the pages that begin within the tokens; not the null page, and not what is not there."""
    pages = range(chunk * size // page_tokens, (chunk + 1) * size // page_tokens)
    return [
        table[page] if page < len(table) and table[page] and begin <= page * page_tokens < end else UNWRITTEN
        for page in pages
    ]


@given(
    per_chunk=st.sampled_from([1, 2, 4]),
    other_page=st.sampled_from([16, 32]),
    begin=st.integers(0, 12),
    length=st.integers(1, 12),
    nulls=st.sets(st.integers(0, 30)),
    cut=st.integers(0, 30),
)
def test_pages_are_those_of_the_definition(
    per_chunk: int, other_page: int, begin: int, length: int, nulls: set[int], cut: int
) -> None:
    size = per_chunk * 32
    groups = Groups((Group(0, HASH, 0, ("a",), None), Group(1, other_page, 64, ("b",), None)), size, HASH)
    tables = [[0 if at in nulls else 100 * group + at + 1 for at in range(30 - cut)] for group in range(2)]
    first, last = begin * 32, (begin + length) * 32
    targets = Targets(groups, tables, first, last)
    assert targets.chunks == range(first // size, -(-last // size))
    everything: set[int] = set()
    for at, group in enumerate(groups):
        of_chunks = {
            chunk: naive(group.page_tokens, tables[at], chunk, size, first, last) for chunk in targets.chunks
        }
        assert all(targets.of(at, chunk) == pages for chunk, pages in of_chunks.items())
        kept = [chunk for chunk, pages in of_chunks.items() if max(pages) >= 0]
        pages = [page for chunk in kept for page in of_chunks[chunk]]
        assert targets.written(at, targets.chunks) == (kept, pages)
        assert targets.wanted(at) == sum(page >= 0 for page in pages)
        everything |= {page for page in pages if page >= 0}
    assert targets.since(0) == everything
    assert targets.of(0, targets.chunks.stop) == [UNWRITTEN] * (size // HASH)


def test_a_page_that_has_computed_tokens_is_wanted_but_not_written() -> None:
    groups = Groups((Group(0, 32, 0, ("a",), None),), 32, 16)
    targets = Targets(groups, [[7, 8]], 16, 64)
    assert targets.of(0, 0) == [UNWRITTEN] and targets.of(0, 1) == [8]
    assert targets.wanted(0) == 2
