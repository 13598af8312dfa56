"""What the engine asks of a lower tier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Tier(Protocol):
    """Keeps whole chunks under their keys, verbatim, and gives back exactly what it was given or nothing.

    Called from several threads at once. A method may block as long as the device behind it does. What it
    raises the engine counts as a failure of this tier and takes for a miss: nothing of it reaches who
    called the engine.
    """

    @property
    def name(self) -> str:
        """A short word that counters and log lines carry, as "rocksdb"."""
        ...

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Say of each key whether its chunk is here; a hint: `get` may find it gone."""
        ...

    def get(self, key: bytes, into: torch.Tensor, layout: bytes) -> bool:
        """Fill `into` (uint8, 1-D, contiguous) with the chunk of `key`; whether that was done.

        False if there is none, or it has another layout fingerprint or length, or it is damaged; what
        `into` holds is then undefined. `into` is the caller's again at the return.
        """
        ...

    def put(self, key: bytes, chunk: torch.Tensor, layout: bytes) -> None:
        """Keep a copy of `chunk` (uint8, 1-D, contiguous), or not: room decides. layout: its fingerprint.

        `chunk` is read before the return and never after it. A key that is there already keeps what it has.
        """
        ...

    def remove(self, keys: Sequence[bytes]) -> int:
        """Forget these chunks; how many there were."""
        ...

    def clear(self) -> None:
        """Forget all chunks."""
        ...

    def close(self) -> None:
        """End; idempotent. Whoever made the tier closes it, the engine does not."""
        ...
