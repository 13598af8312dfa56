"""Without Mooncake's wheel there is nothing to test here."""

from __future__ import annotations

import pytest

pytest.importorskip("mooncake.store", reason="Mooncake is not installed", exc_type=ImportError)
