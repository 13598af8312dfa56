"""A directory with one small segment, for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.pool import Pool
from vcache.limits import KIB

ROOM: Final = 8
"""Extents of 4 KiB that the pool holds."""


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    pool = Pool(tmp_path / "extents", segments=(ROOM * 4 * KIB,))
    yield pool
    pool.close()
