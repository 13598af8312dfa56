"""LMCache's keys as chunk keys.

A chunk that LMCache stores layer by layer is one chunk of ours with a part for each layer, so that its layers
come and go together; a layer's key is the chunk's key and a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from vcache.keys import KeyChain, join_fields


class Place(NamedTuple):
    """Where a key of LMCache's leads: a part of a chunk."""

    key: bytes
    part: int
    layered: bool


class Keys:
    """The chunk keys of one engine. LMCache's own key says model, ranks, dtype and tags."""

    def __init__(self, fingerprint: bytes, model: str, rank: int) -> None:
        self._chain = KeyChain(fingerprint, model, rank)

    def place(self, key: Any) -> Place:
        """Of a CacheEngineKey (a whole chunk) or a LayerCacheEngineKey (one layer of it)."""
        layer = getattr(key, "layer_id", None)
        if layer is None:
            return Place(self._bound(b"whole", key), 0, False)
        return Place(self._bound(b"layers", key), int(layer), True)

    def places(self, keys: Sequence[Any]) -> list[Place]:
        """Of each key."""
        return [self.place(key) for key in keys]

    def both(self, key: Any) -> list[bytes]:
        """The chunk keys under which the tokens of `key` may be stored: as a whole, and by layers."""
        return [self._bound(b"whole", key), self._bound(b"layers", key)]

    def _bound(self, how: bytes, key: Any) -> bytes:
        tags = [f"{name}%{value}".encode() for name, value in key.tags or ()]
        fields = [
            how,
            key.model_name.encode(),
            str(key.world_size).encode(),
            str(key.worker_id).encode(),
            key.chunk_hash_hex.encode(),
            str(key.dtype).encode(),
            *tags,
        ]
        return self._chain.bind(join_fields(fields))
