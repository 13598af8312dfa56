"""What the vLLM connector brings up from lower tiers while they are emptied: nothing of before."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
import torch

from integration.vllm.below import Below
from tests.processes.content import LAYOUT
from tests.processes.worker import DEADLINE_S
from tests.support.lending_client import lending_client
from vcache.client import Client
from vcache.config import load
from vcache.engine.pool import Pool
from vcache.engine.stats import Counters
from vcache.tiers import Found, MemoryTier

KEY = b"k" * 32


class Tier(MemoryTier):
    """Each call can be held until the test lets it go on; `clear` fails while it is told to."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.got, self.clearing, self.go = threading.Event(), threading.Event(), threading.Event()
        self.after_contains = lambda: None
        self.holds_get = self.holds_clear = self.fails = False

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        there = super().contains(keys)
        self.after_contains()
        return there

    def get(self, key: bytes, into: torch.Tensor, layout: bytes) -> Found | None:
        found = super().get(key, into, layout)
        self.got.set()
        assert not self.holds_get or self.go.wait(DEADLINE_S)
        return found

    def clear(self) -> None:
        self.clearing.set()
        assert not self.holds_clear or self.go.wait(DEADLINE_S)
        if self.fails:
            raise OSError("no disk")
        super().clear()


@pytest.fixture
def client() -> Iterator[Client]:
    with lending_client("below") as client:
        yield client


@pytest.fixture
def tier() -> Tier:
    made = Tier()
    assert made.put(KEY, torch.ones(LAYOUT.chunk_bytes, dtype=torch.uint8), LAYOUT.fingerprint)
    return made


@pytest.fixture
def below(client: Client, tier: Tier) -> Iterator[Below]:
    counters, config = Counters(), load().config
    made = Below(Pool(client, counters, LAYOUT, "model", "shm:0"), [tier], LAYOUT, counters, config)
    yield made
    tier.go.set()
    made.close()


def bring(below: Below) -> int:
    return below.bring(below.look([KEY]), range(1), within_s=DEADLINE_S)


def chunks(client: Client) -> int:
    return len(client.list(0, 10).rows)


def test_what_is_below_comes_up(client: Client, below: Below) -> None:
    assert bring(below) == 1
    assert chunks(client) == 1


def test_what_was_found_before_it_was_forgotten_is_not_brought(
    client: Client, tier: Tier, below: Below
) -> None:
    forgetting = threading.Thread(target=below.forget)
    tier.holds_clear = True

    def forget() -> None:
        forgetting.start()
        assert tier.clearing.wait(DEADLINE_S)

    tier.after_contains = forget
    assert bring(below) == 0
    assert chunks(client) == 0
    tier.go.set()
    forgetting.join(DEADLINE_S)
    assert len(tier) == 0


def test_what_comes_up_while_the_pool_is_cleared_is_forgotten(
    client: Client, tier: Tier, below: Below
) -> None:
    tier.holds_get = True
    bringing = threading.Thread(target=bring, args=(below,))
    bringing.start()
    assert tier.got.wait(DEADLINE_S)
    client.clear()  # as the scheduler's half does
    forgetting = threading.Thread(target=below.forget)
    forgetting.start()
    tier.go.set()
    bringing.join(DEADLINE_S)
    forgetting.join(DEADLINE_S)
    assert chunks(client) == 0 and len(tier) == 0


def test_nothing_is_brought_from_a_tier_that_could_not_be_emptied(
    client: Client, tier: Tier, below: Below
) -> None:
    tier.fails = True
    below.forget()
    assert bring(below) == 0
    tier.fails = False
    assert bring(below) == 0
    assert chunks(client) == 0 and len(tier) == 0
    assert tier.put(KEY, torch.ones(LAYOUT.chunk_bytes, dtype=torch.uint8), LAYOUT.fingerprint)
    assert bring(below) == 1


def test_what_was_looked_for_while_a_tier_could_not_be_emptied_is_not_brought(
    client: Client, tier: Tier, below: Below
) -> None:
    tier.fails = tier.holds_clear = True
    forgetting = threading.Thread(target=below.forget)
    forgetting.start()
    assert tier.clearing.wait(DEADLINE_S)
    seen = below.look([KEY])
    tier.go.set()
    forgetting.join(DEADLINE_S)
    assert below.bring(seen, range(1), within_s=DEADLINE_S) == 0
    assert chunks(client) == 0


def test_what_a_slow_tier_brings_after_it_was_forgotten_does_not_stay(
    client: Client, tier: Tier, below: Below
) -> None:
    tier.holds_get = True
    bringing = threading.Thread(target=bring, args=(below,))
    bringing.start()
    assert tier.got.wait(DEADLINE_S)
    below.forget()  # does not wait for it
    tier.go.set()
    bringing.join(DEADLINE_S)
    assert chunks(client) == 0 and len(tier) == 0
