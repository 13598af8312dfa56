"""`MooncakeTier`: an engine's side of a Mooncake Store."""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from vcache.config import MooncakeConfig
from vcache.errors import Unavailable
from vcache.limits import (
    KEYS_PER_REQUEST_MAX,
    MOONCAKE_FULL_PAUSES_S,
    MOONCAKE_REACH_S,
    RECORD_HEADER_BYTES,
)
from vcache.logs import Line
from vcache.tiers.base import Found
from vcache.tiers.mooncake.codes import Meaning, meaning_of
from vcache.tiers.mooncake.native import Native, tried
from vcache.tiers.record import Flaw, flaw_of, has_expired, header_for, read_header

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

_NO_SIZES: Final = (-704, -800, -900)
"""What `get_size` says where there is no size: a miss, a dead holder, a dead master."""

_HEADERS: Final = 64
"""Headers that calls under way have memory for: more than an engine has threads for this tier."""


class MooncakeTier:
    """Chunks in a Mooncake Store. Thread-safe; a call may take as long as Mooncake lets it (30 s and more).

    Chunks go straight from the memory that is given and into it: it is registered with Mooncake while a call
    runs. clock: seconds since 1970.
    """

    name: Final = "mooncake"

    def __init__(self, config: MooncakeConfig, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._clock = clock
        self._native = Native(config)
        self._headers = _Headers()
        self._registered = _Registered()
        self._random = random.Random()

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Say of each key whether its chunk is there: one whose holder has just died is said to be, too."""
        found: list[bool] = []
        with self._native.store(MOONCAKE_REACH_S) as store:
            for begin in range(0, len(keys), KEYS_PER_REQUEST_MAX):
                codes = store.batch_is_exist([*map(self._named, keys[begin : begin + KEYS_PER_REQUEST_MAX])])
                if codes and all(code < 0 for code in codes):
                    raise Unavailable(f"mooncake: {meaning_of(codes[0]).value} ({codes[0]})")
                found += [code == 1 for code in codes]
        return found

    def get(self, key: bytes, into: torch.Tensor, layout: bytes) -> Found | None:
        """Fill `into` with the chunk of `key`; a value that is not exactly that is deleted."""
        name = self._named(key)
        with self._native.store(MOONCAKE_REACH_S) as store, self._lent(store, into) as (header_at, header):
            code = _one(
                store.batch_get_into_multi_buffers(
                    [name], [[header_at, into.data_ptr()]], [[RECORD_HEADER_BYTES, into.numel()]]
                )
            )
            if code < 0:
                self._missed(store, name, RECORD_HEADER_BYTES + into.numel(), code)
                return None
            read = self._read(header.numpy().tobytes(), key, into, layout, code)
            if isinstance(read, Flaw):
                self._delete(store, name, read.value)
                return None
            return read

    def _read(self, raw: bytes, key: bytes, into: torch.Tensor, layout: bytes, size: int) -> Found | Flaw:
        """What came: the chunk, or what is wrong with it. size: of the whole value."""
        if size != RECORD_HEADER_BYTES + into.numel():
            return Flaw.LENGTH
        header = read_header(raw)
        if isinstance(header, Flaw):
            return header
        flaw = flaw_of(header, key, layout, into.numpy())
        if flaw is not None:
            return flaw
        expires_ms = header.expiry_ms(self._config.ttl_s)
        return Flaw.EXPIRED if has_expired(expires_ms, int(self._clock() * 1000)) else Found(expires_ms)

    def _missed(self, store: Any, name: str, size: int, code: int) -> None:
        """What a get that brought nothing means. Raises Unavailable where the tier is to blame."""
        meaning = meaning_of(code)
        if meaning is Meaning.MISS:
            return
        is_other = meaning is Meaning.HOLDER and store.get_size(name) not in (size, *_NO_SIZES)
        if meaning is Meaning.MISFIT or is_other:
            self._delete(store, name, Flaw.LENGTH.value)  # a shorter value is -800, too
            return
        if meaning is Meaning.HOLDER and self._config.replicas == 1:
            # The master takes a dead holder for alive for some seconds, and a put of this key meanwhile
            # would say that it was done and store nothing. Without the key it does not. Where there are
            # copies one may live.
            self._delete(store, name, meaning.value)
        raise Unavailable(f"mooncake: {meaning.value} ({code})")

    def put(self, key: bytes, chunk: torch.Tensor, layout: bytes, expires_ms: int = 0) -> bool:
        """Have the store keep a copy of `chunk`; False if it has no room even after some tries."""
        name = self._named(key)
        with self._native.store(MOONCAKE_REACH_S) as store, self._lent(store, chunk) as (header_at, header):
            now_ms = int(self._clock() * 1000)
            packed = header_for(key, layout, chunk.numpy(), now_ms, expires_ms).pack()
            header.numpy()[:] = memoryview(packed)
            places = [[header_at, chunk.data_ptr()]]
            sizes = [[RECORD_HEADER_BYTES, chunk.numel()]]
            code = tried(
                lambda: _one(store.batch_put_from_multi_buffers([name], places, sizes, self._replicas())),
                lambda code: meaning_of(code) is Meaning.FULL,
                [pause_s * self._random.uniform(0.5, 1.5) for pause_s in MOONCAKE_FULL_PAUSES_S],
            )
        meaning = meaning_of(code)
        if meaning in (Meaning.DONE, Meaning.FULL):
            return meaning is Meaning.DONE
        raise Unavailable(f"mooncake: {meaning.value} ({code})")

    def remove(self, keys: Sequence[bytes]) -> int:
        """Forget these chunks, also those that somebody reads; how many there were.

        Raises Unavailable if one may still be there: all others are forgotten then.
        """
        with self._native.store(MOONCAKE_REACH_S) as store:
            codes = [store.remove(self._named(key), True) for key in keys]
        failed = [code for code in codes if meaning_of(code) not in (Meaning.DONE, Meaning.MISS)]
        if failed:
            raise Unavailable(f"mooncake: {meaning_of(failed[0]).value} ({failed[0]})")
        return sum(code >= 0 for code in codes)

    def clear(self) -> None:
        """Forget all chunks of this namespace."""
        with self._native.store(MOONCAKE_REACH_S) as store:
            code = store.remove_by_regex(f"^{re.escape(self._config.namespace)}/.*", True)
            if code < 0:
                raise Unavailable(f"mooncake: {meaning_of(code).value} ({code})")

    def close(self) -> None:
        """End; waits, bounded, for calls under way, whose memory stays lent until they are over."""
        if not self._native.close():
            _log.warning(Line("mooncake hangs at close; its client is left as it is"))

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the store answers; whether it does. For commands and tests."""
        deadline_s = time.monotonic() + timeout_s
        pause = threading.Event()
        while True:
            try:
                self.contains([bytes(32)])
                return True
            except Unavailable:
                if time.monotonic() > deadline_s:
                    return False
                pause.wait(0.05)

    def _named(self, key: bytes) -> str:
        return f"{self._config.namespace}/{key.hex()}"

    def _delete(self, store: Any, name: str, why: str) -> None:
        _log.warning(Line("a value is deleted", tier=self.name, key=name, reason=why))
        store.remove(name, True)

    def _replicas(self) -> Any:
        from mooncake.store import ReplicateConfig

        replicas = ReplicateConfig()
        replicas.replica_num = self._config.replicas
        if self._config.soft_pin:
            _soft_pin(replicas)
        if self._config.preferred_segments is not None:
            replicas.preferred_segments = [
                part.strip() for part in self._config.preferred_segments.split(",") if part.strip()
            ]
        return replicas

    @contextmanager
    def _lent(self, store: Any, chunk: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Register a chunk's memory and that of a header, for the block: (address of the header, header)."""
        with (
            self._headers.one() as header,
            self._registered.during(store, header),
            self._registered.during(store, chunk),
        ):
            yield header.data_ptr(), header


class _Headers:
    """Memory for the headers of calls under way."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self._guard = threading.Lock()

    @contextmanager
    def one(self) -> Iterator[torch.Tensor]:
        with self._guard:
            header = self._free.pop() if self._free else None
        if header is None:
            import torch

            header = torch.zeros(RECORD_HEADER_BYTES, dtype=torch.uint8)
        try:
            yield header
        finally:
            with self._guard:
                if len(self._free) < _HEADERS:
                    self._free.append(header)


class _Registered:
    """Memory that Mooncake may use now. Two calls over the same bytes register them once."""

    def __init__(self) -> None:
        self._uses: dict[int, int] = {}
        self._guard = threading.Lock()

    @contextmanager
    def during(self, store: Any, memory: torch.Tensor) -> Iterator[None]:
        address = memory.data_ptr()
        with self._guard:
            if not self._uses.get(address):
                code = store.register_buffer(address, memory.numel())
                if code != 0:
                    raise Unavailable(f"mooncake: memory cannot be registered ({code})")
            self._uses[address] = self._uses.get(address, 0) + 1
        try:
            yield
        finally:
            with self._guard:
                self._uses[address] -= 1
                if not self._uses[address]:
                    del self._uses[address]
                    store.unregister_buffer(address)


def _soft_pin(replicas: Any) -> None:
    """Ask that others be evicted first, in the words of the installed version."""
    if hasattr(replicas, "with_soft_pin"):
        replicas.with_soft_pin = True
        return
    from mooncake.store import SoftPinAction

    replicas.soft_pin_action = SoftPinAction.ENABLE


def _one(codes: Sequence[int]) -> int:
    return int(codes[0]) if codes else -1
