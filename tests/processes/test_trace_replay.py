"""A trace through a real server hits the very blocks that the simulation says: use, eviction, room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pytest

from benchmarks.trace_replay import ServerPool, server_pool
from benchmarks.trace_sim import Request, SimulatedPool
from metadata_server.eviction import PolicyName, make_policy
from tests.test_trace import conversations, requests_of

BLOCKS = 300


def side_by_side(
    requests: Sequence[Request], simulated: SimulatedPool, real: ServerPool
) -> tuple[list[int], list[int]]:
    """The hits of each request in both pools."""
    hits: tuple[list[int], list[int]] = [], []
    for request in requests:
        for pool, counted in ((simulated, hits[0]), (real, hits[1])):
            counted.append(pool.prefix_hit(request.keys))
            pool.store(request.keys)
    return hits


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_the_server_hits_what_the_simulation_hits(policy: PolicyName) -> None:
    requests = requests_of(conversations(seed=3, turns=300))

    with server_pool(BLOCKS, policy) as (real, client):
        expected, hits = side_by_side(requests, SimulatedPool(BLOCKS, make_policy(policy)), real)
        client.check()
        counters = client.stats().counters

    assert hits == expected
    assert sum(hits) > 1_000, "a trace without hits shows nothing"
    assert counters["evicted"] > BLOCKS, "a pool that nothing leaves shows nothing"


def test_of_a_request_longer_than_the_pool_the_head_is_stored() -> None:
    (request,) = requests_of([list(range(BLOCKS + 20))])

    with server_pool(BLOCKS, "lru") as (real, _):
        assert real.store(request.keys) == BLOCKS
        assert real.prefix_hit(request.keys) == BLOCKS
