"""A trace replayed through the real metadata server by the real client, beside the simulation of it.

The server allocates, grants, commits and evicts as in production; only KV is not moved: an extent is one page
here, so that a pool of 30,000 blocks takes 120 MiB. A request is what an engine makes of a prompt: a lookup,
the right to read what was found and its release, the right to write what is missing and its commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from benchmarks.processes import Pool as Processes
from benchmarks.trace_sim import Replay, Request, replay
from metadata_server.eviction import PolicyName
from vcache.client import Client
from vcache.keys import namespace
from vcache.layout import KVLayout
from vcache.limits import EXTENT_ALIGN_BYTES
from vcache.protocol import Outcome
from vcache.segment import DATA_OFFSET, allocate

LAYOUT: Final = KVLayout(num_layers=1, num_kv_heads=1, head_size=64, dtype="float16", chunk_tokens=16)
"""A chunk is one extent of the smallest size: 4 KiB."""

MODEL: Final = "trace replay"


class ServerPool:
    """A pool of the real server's, as the simulation's `Pool`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._fingerprint = LAYOUT.fingerprint
        self._namespace = namespace(MODEL)

    def prefix_hit(self, keys: Sequence[bytes]) -> int:
        """The number of leading keys that are in the pool: looked up, then acquired, which is the use."""
        found = self._client.lookup(keys, self._fingerprint)
        if not found:
            return 0
        grant = self._client.acquire(keys[:found], layout=self._fingerprint)
        self._client.release(grant)
        return len(grant.extents)

    def store(self, keys: Sequence[bytes]) -> int:
        """Reserve what is missing of these keys, and commit as much of it as was granted."""
        distinct = list(dict.fromkeys(keys))
        if not distinct:
            return 0
        reserved = self._client.reserve(distinct, layout=self._fingerprint, size=LAYOUT.chunk_bytes)
        granted = len(reserved.extents)
        if not granted:
            return 0
        missing = [key for key, there in zip(distinct, reserved.present, strict=True) if not there]
        lengths = [LAYOUT.chunk_bytes] * granted
        outcomes = self._client.commit(
            reserved.extents, missing[:granted], lengths, namespace=self._namespace
        )
        if outcomes.count(Outcome.COMMITTED) != granted:
            raise RuntimeError(f"of {granted} commits {outcomes.count(Outcome.COMMITTED)} held")
        return granted


@contextmanager
def server_pool(blocks: int, policy: PolicyName) -> Iterator[tuple[ServerPool, Client]]:
    """A private server with one segment that holds exactly `blocks` blocks, and a client of it."""
    assert LAYOUT.chunk_bytes == EXTENT_ALIGN_BYTES
    with Processes(policy=policy) as processes:
        processes.start_server()
        client = processes.client(lambda: allocate("shm:0", DATA_OFFSET + blocks * LAYOUT.chunk_bytes))
        try:
            room = sum(segment.size for segment in client.stats().segments)
            if room != blocks * LAYOUT.chunk_bytes:
                raise RuntimeError(f"the pool has {room} bytes, wanted {blocks} blocks exactly")
            yield ServerPool(client), client
        finally:
            client.close()


def replay_through_server(
    requests: Sequence[Request],
    blocks: int,
    policy: PolicyName,
    block_tokens: int,
    progress: Callable[[Iterable[Request]], Iterable[Request]] = iter,
) -> Replay:
    """What a real pool of `blocks` blocks hits in the trace. Raises ServerError if its books are wrong then.

    requests_per_s of the result is that of one client that makes one request after the other.
    """
    with server_pool(blocks, policy) as (pool, client):
        result = replay(requests, pool, block_tokens, progress)
        client.check()
    return result
