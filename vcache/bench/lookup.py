"""How long requests to the metadata server take, beside a bare ZeroMQ echo of the same size."""

from __future__ import annotations

import gc
import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from vcache.bench.echo import Echo
from vcache.client import Client
from vcache.config import Config
from vcache.errors import SegmentError
from vcache.keys import namespace
from vcache.limits import EXTENT_ALIGN_BYTES, FINGERPRINT_BYTES, KEY_BYTES, MIB, TOKEN_BYTES
from vcache.protocol import Lookup, encode_request, join_keys
from vcache.segment import Segment, allocate

KEYS_LOOKUP: Final = 512
"""Chunks of 256 tokens of a prompt of 128 k tokens."""

KEYS_ACQUIRE: Final = 128
"""Chunks of one of 32 k tokens."""

SEGMENT_BYTES: Final = 8 * MIB
"""Room for KEYS_LOOKUP chunks of a page, and too small for anybody else's chunks."""

WARM_UP: Final = 20

_DEVICE: Final = "shm:9999"
"""A label that no engine prefers."""

_MODEL: Final = "vcache bench"


class LookupRow(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of request: keys in it, and over all rounds of one run its median and 99th percentile.

    ratio: median to the echo's median.
    """

    name: str
    keys: int
    rounds: int
    median_us: float
    p99_us: float
    keys_per_s: float
    ratio: float


@contextmanager
def bench_client(config: Config) -> Iterator[Client]:
    """A client that lends a small segment for what is measured. Raises SegmentError, Unavailable."""

    def new_segment() -> Segment:
        return allocate(_DEVICE, SEGMENT_BYTES)

    client = Client(config, name="vcache bench", new_segment=new_segment)
    try:
        wait_s = config.client.connect_timeout_ms / 1e3
        if not client.wait_connected(wait_s):
            client.ping()  # raises why
        if not client.own_segment:
            raise SegmentError(
                f"the segment of {SEGMENT_BYTES // MIB} MiB for the measurement is not lent: see the log"
            )
        yield client
    finally:
        client.close()


def measure(
    client: Client, echo: Echo, rounds: int = 1_000, *, on_round: Callable[[], None] = lambda: None
) -> list[LookupRow]:
    """Time each kind of request `rounds` times, one after the other in every round.

    client: of `bench_client`. Stores small chunks in its segment and forgets them afterwards.
    """
    layout = secrets.token_bytes(FINGERPRINT_BYTES)
    keys = [secrets.token_bytes(KEY_BYTES) for _ in range(KEYS_LOOKUP)]
    frame = encode_request(
        Lookup(join_keys(keys[:1]), layout),
        rid=1 << 32,
        session=1 << 62,
        token=secrets.token_bytes(TOKEN_BYTES),
        epoch=1 << 62,
    )
    _store(client, keys, layout)
    subjects: dict[tuple[str, int], Callable[[], object]] = {
        ("ZeroMQ echo", 0): lambda: echo.exchange(frame),
        ("lookup", 1): lambda: client.lookup(keys[:1], layout),
        ("lookup", KEYS_LOOKUP): lambda: client.lookup(keys, layout),
        ("acquire + release", KEYS_ACQUIRE): lambda: client.release(
            client.acquire(keys[:KEYS_ACQUIRE], layout=layout)
        ),
    }
    try:
        times = _interleaved(subjects, rounds, on_round)
    finally:
        client.remove(keys)
    base = statistics.median(times["ZeroMQ echo", 0])
    return [_row(name, count, seconds, base) for (name, count), seconds in times.items()]


def _store(client: Client, keys: list[bytes], layout: bytes) -> None:
    """Commit one page under each key. What is in it does not matter: nobody reads it."""
    client.describe(namespace(_MODEL), _MODEL)
    reserved = client.reserve(keys, layout=layout, size=EXTENT_ALIGN_BYTES, near=client.own_segment)
    extents = reserved.extents
    lengths = [EXTENT_ALIGN_BYTES] * len(extents)
    client.commit(extents, keys[: len(extents)], lengths, namespace=namespace(_MODEL))
    found = client.lookup(keys, layout)
    if found != len(keys):
        client.remove(keys)
        raise SegmentError(
            f"the pool took {found} of the {len(keys)} chunks of the measurement: is it under load?"
        )


def _interleaved(
    subjects: dict[tuple[str, int], Callable[[], object]], rounds: int, on_round: Callable[[], None]
) -> dict[tuple[str, int], list[float]]:
    """Seconds of each subject in every round, after WARM_UP rounds that do not count."""
    times: dict[tuple[str, int], list[float]] = {subject: [] for subject in subjects}
    collects = gc.isenabled()
    gc.disable()
    try:
        for number in range(-WARM_UP, rounds):
            for subject, call in subjects.items():
                begin = time.perf_counter()
                call()
                if number >= 0:
                    times[subject].append(time.perf_counter() - begin)
            on_round()
    finally:
        if collects:
            gc.enable()
    return times


def _row(name: str, keys: int, seconds: list[float], base: float) -> LookupRow:
    middle = statistics.median(seconds)
    ordered = sorted(seconds)
    return LookupRow(
        name=name,
        keys=keys,
        rounds=len(seconds),
        median_us=middle * 1e6,
        p99_us=ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1e6,
        keys_per_s=keys / middle,
        ratio=middle / base,
    )


def machine() -> dict[str, object]:
    """What a result must name: processor and cores."""
    model = "unknown"
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {"cpu": model, "cores": len(os.sched_getaffinity(0))}
