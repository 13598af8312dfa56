"""What a table's file holds at each instant of a piece of work: what a server that is killed there leaves
behind.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from vcache.table import ExtentTable

_WORD_BYTES = 8
_WRITERS = ("vcache/table.py", "metadata_server/")


def instants(table: ExtentTable, work: Callable[[], object]) -> list[bytes]:
    """The file before, between any two stores of 8 bytes, and after `work`.

    It is looked at whenever a line of the server's code is about to run. What one line wrote is taken apart
    into its 8-byte words, in rising and in falling order: the processor may have stored them in either.
    """
    seen = [table_bytes(table)]

    def on_line(frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
        now = table_bytes(table)
        if now != seen[-1]:
            seen.append(now)
        return on_line

    def on_call(frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        return on_line if any(part in frame.f_code.co_filename for part in _WRITERS) else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        work()
    finally:
        sys.settrace(before)
    seen.append(table_bytes(table))
    torn = [seen[0]]
    for old, new in itertools.pairwise(seen):
        torn += _between(old, new)
        torn.append(new)
    return list(dict.fromkeys(torn))


def _between(old: bytes, new: bytes) -> Iterator[bytes]:
    words_old, words_new = np.frombuffer(old, np.uint64), np.frombuffer(new, np.uint64)
    changed = np.flatnonzero(words_old != words_new)
    for order in (changed, changed[::-1]):
        torn = words_old.copy()
        for at in order[:-1].tolist():
            torn[at] = words_new[at]
            yield torn.tobytes()


def table_bytes(table: ExtentTable) -> bytes:
    """All that is in the file now."""
    return bytes(table._map)


def leave(path: Path, content: bytes) -> Path:
    """The file that a killed server left."""
    path.write_bytes(content)
    return path
