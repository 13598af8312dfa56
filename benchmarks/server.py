"""The metadata server beside a bare ZeroMQ echo between two processes: `python -m benchmarks.server`.

The echo is the physical limit of a request: the same frame, the same sockets, nothing done with it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from typing import Final

from benchmarks.processes import DEADLINE_S, Pool
from benchmarks.report import Figure, at_least, at_most, interleaved, ratio
from vcache import protocol
from vcache.bench.echo import Echo, echo
from vcache.client import Client
from vcache.layout import KVLayout
from vcache.segment import allocate

TITLE: Final = "Metadata server"
CHUNKS: Final = 100_000
LAYOUT: Final = KVLayout(num_layers=1, num_kv_heads=1, head_size=64, dtype="float16", chunk_tokens=16)
ROUNDS: Final = 40
CALLS: Final = 50
STARTS: Final = 5
RESTARTS: Final = 3


def _fill(client: Client, count: int) -> list[bytes]:
    keys = [os.urandom(32) for _ in range(count)]
    for begin in range(0, count, 4096):
        part = keys[begin : begin + 4096]
        reserved = client.reserve(part, layout=LAYOUT.fingerprint, size=LAYOUT.chunk_bytes)
        if len(reserved.extents) != len(part):
            raise RuntimeError(f"{len(reserved.extents)} of {len(part)} extents granted")
        client.commit(reserved.extents, part, [LAYOUT.chunk_bytes] * len(part), namespace=bytes(8))
    return keys


def _latencies(client: Client, echo: Echo, frame: bytes, keys: list[bytes]) -> Iterator[Figure]:
    fingerprint = LAYOUT.fingerprint

    def timed_echo() -> float:
        begin = time.perf_counter()
        for _ in range(CALLS):
            echo.exchange(frame)
        return (time.perf_counter() - begin) / CALLS

    def timed_lookup(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(CALLS):
            if client.lookup(keys[:count], fingerprint) != count:
                raise RuntimeError("a lookup missed")
        return (time.perf_counter() - begin) / CALLS

    def timed_acquire() -> float:
        begin = time.perf_counter()
        for _ in range(CALLS):
            client.release(client.acquire(keys[:128], layout=fingerprint))
        return (time.perf_counter() - begin) / CALLS

    contestants = [timed_echo, lambda: timed_lookup(1), timed_acquire, lambda: timed_lookup(512)]
    bare, one, acquire, many = interleaved(contestants, ROUNDS)
    yield Figure(f"bare ZeroMQ echo, {len(frame)} bytes", f"{statistics.median(bare) * 1e6:,.0f} µs")
    yield Figure("1-key lookup", f"{statistics.median(one) * 1e6:,.0f} µs")
    yield at_most("1-key lookup over the echo", ratio(one, bare), 1.5, "×")
    yield Figure("acquire + release of 128 keys", f"{statistics.median(acquire) * 1e6:,.0f} µs")
    yield at_most("acquire + release of 128 keys over the echo", ratio(acquire, bare), 3, "×")
    yield at_least("512-key lookups", 512 / statistics.median(many), 1_000_000, "keys/s")


def run() -> list[Figure]:
    """Measure; takes some 20 s."""
    figures: list[Figure] = []
    with Pool() as pool:
        starts = []
        for _ in range(STARTS):
            starts.append(pool.start_server())
            pool.kill_server()
        figures.append(at_most("start to ready", statistics.median(starts), 0.5, "s"))
        pool.start_server()
        size = (CHUNKS + 4096) * LAYOUT.chunk_bytes
        client = pool.client(lambda: allocate("shm:0", size))
        try:
            before = pool.server_memory()
            keys = _fill(client, CHUNKS)
            grown = (pool.server_memory() - before) / 1e6
            figures.append(at_most(f"server memory for {CHUNKS:,} chunks", grown, 100, "MB"))
            frame = protocol.encode_request(
                protocol.Lookup(keys[0], LAYOUT.fingerprint),
                rid=1 << 40,
                session=1 << 62,
                token=bytes(16),
                epoch=1 << 62,
            )
            with echo(pool.folder) as echoing:
                figures += _latencies(client, echoing, frame, keys)
            figures.append(at_most(f"restart with {CHUNKS:,} chunks", _restart(pool, client, keys), 1, "s"))
        finally:
            client.close()
    return figures


def _restart(pool: Pool, client: Client, keys: list[bytes]) -> float:
    """Seconds from the start of a killed server's successor until it accepts sessions, its pool warm."""
    taken = []
    for _ in range(RESTARTS):
        pool.kill_server()
        taken.append(pool.start_server())
        if not client.wait_connected(DEADLINE_S) or client.lookup(keys[:512], LAYOUT.fingerprint) != 512:
            raise RuntimeError("the pool was cold after the restart")
    return statistics.median(taken)


if __name__ == "__main__":
    from benchmarks.report import main

    main(TITLE, run)
