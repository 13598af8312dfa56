"""These tests run when they are asked for, `pytest tests/mooncake`: they need the wheel."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this folder out of a run over everything."""
    is_asked = any("mooncake" in argument for argument in config.args)
    return None if is_asked else True
