"""Our log lines among LMCache's: in its format, at its level."""

from __future__ import annotations

import logging


def log_with_lmcache() -> None:
    """Have our lines look and go as LMCache's own, unless the application has said where ours go."""
    from lmcache.logging import init_logger

    if not logging.getLogger("vcache").handlers and not logging.getLogger().handlers:
        init_logger("vcache")
