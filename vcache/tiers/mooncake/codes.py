"""What the return codes of Mooncake's client mean for a cache."""

from __future__ import annotations

from enum import Enum
from typing import Final


class Meaning(Enum):
    """What a code is to us."""

    DONE = "done"
    MISS = "there is none"
    FULL = "no room now; eviction runs in the background"
    BUSY = "somebody reads it now"
    MISFIT = "the value has another size, or a key or memory is not as it should be"
    HOLDER = "whoever holds it does not answer"
    MASTER = "the master does not answer"
    OTHER = "an error"


_MEANINGS: Final = {
    -200: Meaning.FULL,
    -600: Meaning.MISFIT,
    -704: Meaning.MISS,
    -706: Meaning.BUSY,
    -800: Meaning.HOLDER,
    -900: Meaning.MASTER,
}


def meaning_of(code: int) -> Meaning:
    """What a return code means; codes of 0 and more are counts."""
    return Meaning.DONE if code >= 0 else _MEANINGS.get(code, Meaning.OTHER)
