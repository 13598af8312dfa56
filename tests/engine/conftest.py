"""One server, and an engine of this process, for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.processes.pool import Pool
from tests.support.engines import make
from vcache.engine import VCacheEngine


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool() as running:
        running.start_server()
        yield running
        running.check()


@pytest.fixture(scope="module")
def engine(pool: Pool) -> Iterator[VCacheEngine]:
    with make(pool, size="16MiB") as made:
        yield made
