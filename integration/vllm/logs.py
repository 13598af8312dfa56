"""Our log lines among vLLM's: in its format, at its level."""

from __future__ import annotations

import logging


def log_with_vllm() -> None:
    """Have what we log go where vLLM logs, unless the application has said where ours goes."""
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("vcache")
    if not ours.handlers and not logging.getLogger().handlers:
        ours.setLevel(theirs.level)
        ours.propagate = False
        for handler in theirs.handlers:
            ours.addHandler(handler)
