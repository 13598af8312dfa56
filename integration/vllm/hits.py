"""How long a prefix is there: from what each group and rank has, without asking anybody."""

from __future__ import annotations

from collections.abc import Sequence

Flags = Sequence[bool]


def first_needed(end: int, first: int, chunk_tokens: int, window_tokens: int) -> int:
    """The first chunk that a group needs for a hit that ends with chunk `end` - 1 and begins with chunk
    `first`.

    window_tokens: how far back the group's layers look from the next token, 0 for all.
    """
    if not window_tokens:
        return first
    return max(first, (end * chunk_tokens - window_tokens) // chunk_tokens)


def longest_hit(there: Sequence[Flags], windows: Sequence[int], *, first: int, chunk_tokens: int) -> int:
    """The end, in chunks, of the longest hit that begins with chunk `first`; `first` if there is none.

    there: of each group, whether chunk `first` + i is there on all ranks; all of one length. windows: of each
    group, its window_tokens.
    """
    count = len(there[0])
    runs = [_runs(flags) for flags in there]
    for length in range(count, 0, -1):
        end = first + length
        needed = (end - first_needed(end, first, chunk_tokens, window) for window in windows)
        if all(run[length - 1] >= chunks for run, chunks in zip(runs, needed, strict=True)):
            return end
    return first


def _runs(flags: Flags) -> list[int]:
    """Of each position, how many in a row are there up to and with it."""
    runs, run = [], 0
    for flag in flags:
        run = run + 1 if flag else 0
        runs.append(run)
    return runs
