"""Whether a lower tier is asked at all: one that hangs or fails is left alone for a while.

No clock, no locks.
"""

from __future__ import annotations

from vcache.limits import TIER_FAILURES_MAX, TIER_PAUSE_MAX_S, TIER_PAUSE_MIN_S


class TierBreaker:
    """A circuit breaker. Closed: every call is let through. Open: none, until a pause is over; then one,
    which decides: its success closes the breaker, its failure doubles the pause.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._pause_s = TIER_PAUSE_MIN_S
        self._opens_at_s: float | None = None
        self._is_trying = False

    def would_admit(self, now_s: float) -> bool:
        """Whether a call might be made now."""
        return self._opens_at_s is None or (not self._is_trying and now_s >= self._opens_at_s)

    def admits(self, now_s: float) -> bool:
        """Whether a call may be made now; it must then be told how that ended."""
        if not self.would_admit(now_s):
            return False
        self._is_trying = self._opens_at_s is not None
        return True

    def succeeded(self) -> None:
        """A call came back in time, without an error."""
        self._failures = 0
        self._pause_s = TIER_PAUSE_MIN_S
        self._opens_at_s = None
        self._is_trying = False

    def failed(self, now_s: float, *, late: bool) -> None:
        """A call raised, or did not come back in time."""
        self._failures += 1
        if not (late or self._is_trying or self._failures >= TIER_FAILURES_MAX):
            return
        if self._opens_at_s is None or self._is_trying:
            self._opens_at_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, TIER_PAUSE_MAX_S)
        self._is_trying = False
