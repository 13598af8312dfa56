"""A tier in this process' own memory: no device behind it, gone with the process."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from vcache.errors import ArgumentError, EngineClosed
from vcache.tiers.base import Found, has_expired


class _Kept(NamedTuple):
    layout: bytes
    chunk: torch.Tensor
    expires_ms: int


class MemoryTier:
    """Keeps at most `capacity_bytes` of chunks, the least recently used ones go first. Thread-safe.

    clock: seconds since 1970.
    """

    def __init__(
        self, capacity_bytes: int, name: str = "memory", clock: Callable[[], float] = time.time
    ) -> None:
        if capacity_bytes < 0:
            raise ArgumentError("capacity_bytes", capacity_bytes, "0 or more")
        self._name = name
        self._clock = clock
        self._capacity_bytes = capacity_bytes
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._held_bytes = 0
        self._closed = False
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """What counters and log lines call it."""
        return self._name

    @property
    def held_bytes(self) -> int:
        """Bytes of the chunks that are here."""
        return self._held_bytes

    def __len__(self) -> int:
        return len(self._kept)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Say of each key whether its chunk is here."""
        with self._lock:
            return [self._living(key) is not None for key in keys]

    def get(self, key: bytes, into: torch.Tensor, layout: bytes) -> Found | None:
        """Fill `into` with the chunk of `key`; None if it is not here with that layout and length."""
        with self._lock:
            kept = self._living(key)
            if kept is None or kept.layout != layout or kept.chunk.numel() != into.numel():
                return None
            self._kept.move_to_end(key)
        into.copy_(kept.chunk)  # kept chunks are never written to: an eviction meanwhile does no harm
        return Found(kept.expires_ms)

    def _living(self, key: bytes) -> _Kept | None:
        kept = self._kept.get(key)
        return None if kept is None or has_expired(kept.expires_ms, int(self._clock() * 1000)) else kept

    def put(self, key: bytes, chunk: torch.Tensor, layout: bytes, expires_ms: int = 0) -> bool:
        """Keep a copy of `chunk`, evicting for it; one larger than the whole tier is not kept."""
        if chunk.numel() > self._capacity_bytes:
            return False
        copy = torch.empty(chunk.numel(), dtype=torch.uint8)
        copy.copy_(chunk)
        with self._lock:
            if self._closed:
                raise EngineClosed(f"tier {self._name!r} is closed")
            if self._living(key) is not None:
                return True
            self._drop([key])
            while self._held_bytes + copy.numel() > self._capacity_bytes:
                self._held_bytes -= self._kept.popitem(last=False)[1].chunk.numel()
            self._kept[key] = _Kept(layout, copy, expires_ms)
            self._held_bytes += copy.numel()
            return True

    def remove(self, keys: Sequence[bytes]) -> int:
        """Forget these chunks; how many there were."""
        with self._lock:
            return self._drop(keys)

    def _drop(self, keys: Sequence[bytes]) -> int:
        gone = [kept for kept in (self._kept.pop(key, None) for key in keys) if kept is not None]
        self._held_bytes -= sum(kept.chunk.numel() for kept in gone)
        return len(gone)

    def clear(self) -> None:
        """Forget all chunks."""
        with self._lock:
            self._kept.clear()
            self._held_bytes = 0

    def close(self) -> None:
        """Forget all chunks and take no more."""
        self.clear()
        self._closed = True
