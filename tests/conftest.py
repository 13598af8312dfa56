"""What all tests share: a clean environment, GPU tests only when asked for, short runtime directories."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.processes import devices  # reads its variable before all of them are forgotten
from vcache.logs import unconfigure

# No deadline: how long an example takes is up to the machine. The same examples in each run; look for new
# ones with --hypothesis-profile=explore.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2_000, print_blob=True)
hypothesis.settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    """Forget the caller's configuration: tests mean the defaults, and so do the processes that they start."""
    for variable in [name for name in os.environ if name.startswith("VCACHE_")]:
        del os.environ[variable]
    if "gpu" not in config.option.markexpr and not devices.GPUS:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: kernels run on CPU tensors


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked `gpu`, unless -m speaks of them."""
    if "gpu" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """A private directory with a short name: a Unix socket's path has at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="vc-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)  # a server that is just ending may still remove files of its own


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that a test ran in this process has set up logging: the next test begins without."""
    yield
    unconfigure()
