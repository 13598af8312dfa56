"""How a copy may be launched on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from vcache.errors import ArgumentError


@dataclass(frozen=True)
class LaunchOptions:
    """What gather and scatter may take of a GPU; on a CPU it means nothing.

    sm_limit: at most so many streaming multiprocessors are used, so that a copy need not starve what computes
    beside it; 0 for as many as the copy needs to be fast.
    """

    sm_limit: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.sm_limit, int) or isinstance(self.sm_limit, bool) or self.sm_limit < 0:
            raise ArgumentError("sm_limit", repr(self.sm_limit), "an int of at least 0 (0: no limit)")


NO_LIMIT = LaunchOptions()
