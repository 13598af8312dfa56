"""Without LMCache these tests are left out; `make test-lmcache` makes an environment that has it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing import forkserver, set_forkserver_preload

import pytest

from tests.processes.pool import Pool

collect_ignore_glob = [] if find_spec("lmcache") else ["*.py"]


@pytest.fixture(scope="session", autouse=True)
def _imported_once() -> None:
    """Workers are forked from a process that has imported LMCache, which takes seconds."""
    set_forkserver_preload(["vcache.engine", "tests.processes.content", "tests.lmcache.preload"])
    forkserver.ensure_running()


@pytest.fixture
def pool() -> Iterator[Pool]:
    """A pool of real processes, its server running."""
    with Pool() as pool:
        pool.start_server()
        yield pool
