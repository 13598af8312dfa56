"""What the engine asks of a lower tier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


class Found(NamedTuple):
    """A chunk was read. expires_ms: when it expires, in milliseconds since 1970; 0: never."""

    expires_ms: int = 0


def has_expired(expiry_ms: int, now_ms: int) -> bool:
    """Whether a moment has come; both in milliseconds since 1970, expiry 0: never."""
    return bool(expiry_ms) and now_ms >= expiry_ms


@runtime_checkable
class Tier(Protocol):
    """Keeps whole chunks under their keys, verbatim, and gives back exactly what it was given or nothing.

    Called from several threads at once. A method may block as long as the device behind it does: the engine
    calls it in threads of its own and gives up waiting at its deadline. What it raises the engine counts as a
    failure of this tier and takes for a miss: nothing of it reaches who called the engine.
    """

    @property
    def name(self) -> str:
        """A short word that counters and log lines carry, as "rocksdb"."""
        ...

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Say of each key whether its chunk is here; a hint: `get` may find it gone."""
        ...

    def get(self, key: bytes, into: torch.Tensor, layout: bytes) -> Found | None:
        """Fill `into` (uint8, 1-D, contiguous, host memory) with the chunk of `key`.

        None if there is none, or it has expired, or has another layout fingerprint or length, or is damaged;
        what `into` holds is then undefined. `into` is the caller's again at the return, and not before,
        whoever gave up waiting meanwhile.
        """
        ...

    def put(self, key: bytes, chunk: torch.Tensor, layout: bytes, expires_ms: int = 0) -> bool:
        """Keep a copy of `chunk` (uint8, 1-D, contiguous, host memory); whether it is here now: room decides.

        layout: its fingerprint. expires_ms: as in `Found`. `chunk` is read before the return and never after
        it. A key that is there already keeps what it has.
        """
        ...

    def remove(self, keys: Sequence[bytes]) -> int:
        """Forget these chunks; how many there were."""
        ...

    def clear(self) -> None:
        """Forget all chunks."""
        ...

    def close(self) -> None:
        """End; idempotent. Whoever made the tier closes it."""
        ...
