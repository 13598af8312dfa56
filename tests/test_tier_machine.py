"""Pool and lower tier against a model: whatever is stored, evicted, removed, expired, and whenever the tier
fails, a hit has the right bytes, and what the model knows to be there is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.processes.content import AXES, LAYOUT, PagedPrompt, prompt
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S
from vcache import VCacheEngine
from vcache.client import Client
from vcache.config import load
from vcache.engine.lending import Lending
from vcache.keys import KeyChain
from vcache.tiers import Found, MemoryTier

CHUNK = LAYOUT.chunk_tokens
CHUNKS = 4
PROMPT = CHUNKS * CHUNK
CHAIN = KeyChain(LAYOUT.fingerprint, "test-model")

seeds = st.integers(1, 6)


class Moody(MemoryTier):
    """A tier with room for everything, that fails when it is told to, and whose clock is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.fails = False
        super().__init__(1 << 24, "moody", clock=lambda: self.now_s)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        self._may_fail()
        return super().contains(keys)

    def get(self, key: bytes, into: torch.Tensor, layout: bytes) -> Found | None:
        self._may_fail()
        return super().get(key, into, layout)

    def put(self, key: bytes, chunk: torch.Tensor, layout: bytes, expires_ms: int = 0) -> bool:
        self._may_fail()
        return super().put(key, chunk, layout, expires_ms)

    def _may_fail(self) -> None:
        if self.fails:
            raise OSError("the tier is in a mood")


class PoolAndTier(RuleBasedStateMachine):
    """An engine with room for ten chunks in the pool and a tier under it."""

    policy = "write-through"
    under = 0
    """Chunks for which there is room in rank 1."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool()
        self.pool.start_server()
        self.tier = Moody()
        config = self.pool.client_config()
        self.lender: Client | None = None
        self.lending: Lending | None = None
        if self.under:
            size = 4096 + self.under * 8192
            below = {"device": "shm:1", "segment.size": size, "segment.rank": 1}
            self.lending = Lending(load(**config, **below).config)
            self.lender = self.lending.client("rank 1")
            assert self.lender.wait_connected(DEADLINE_S)
        given: dict[str, Any] = {"device": "shm:0", "segment.size": 4096 + 10 * 8192, "tiers.prefetch": False}
        given["tiers.policy"] = self.policy
        self.engine = VCacheEngine(
            layout=LAYOUT,
            model="test-model",
            kv_axes=AXES,
            tiers=[self.tier],
            **{**config, **given},
        )
        assert self.engine.wait_connected(DEADLINE_S)
        self.below: set[int] = set()
        """Prompts all of whose chunks the tier has for certain."""
        self.known: set[int] = set()
        """Prompts that were ever stored and not forgotten since."""
        self.kept: set[int] = set()
        """Prompts that pool and tier have between them for certain, until something is evicted unsaved."""
        self.unsaved = 0.0
        self.aged: set[int] = set()
        """Prompts whose copy below has expired while the pool takes it for saved."""

    def _note_losses(self) -> None:
        """What the pool lost unsaved, it says so; what a tier that fails has cannot be had."""
        unsaved = self.pool.counters().get("evicted_unsaved", 0)
        if unsaved != self.unsaved or self.tier.fails:
            self.kept.clear()
        self.unsaved = unsaved

    def _close_breaker(self) -> None:
        """As if the pause of a tier that failed were over."""
        for calls in self.engine._lower._calls:
            calls._breaker.succeeded()

    @rule(seed=seeds)
    def store(self, seed: int) -> None:
        paged = PagedPrompt(seed, PROMPT).fill()
        self.engine.store(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
        assert self.engine.flush_tiers(DEADLINE_S)
        self.known.add(seed)
        keys = CHAIN.keys(prompt(seed, PROMPT), CHUNK)
        if all(key in self.tier._kept for key in keys):
            self.below.add(seed)
        self._note_losses()
        there = self.pool.observer.contains(keys)
        self._note_losses()
        if (
            seed not in self.aged
            and not self.tier.fails
            and all(one or key in self.tier._kept for one, key in zip(there, keys, strict=True))
        ):
            self.kept.add(seed)

    @rule(seed=seeds)
    def retrieve(self, seed: int) -> None:
        paged = PagedPrompt(seed, PROMPT)
        loaded = self.engine.retrieve(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
        assert paged.wrong_tokens(loaded) == 0
        hit = int(loaded.sum())
        assert hit == 0 or seed in self.known
        self._note_losses()
        if seed in self.below | self.saved() and not self.tier.fails:
            assert hit == PROMPT

    @rule(seed=seeds)
    def look(self, seed: int) -> None:
        found = self.engine.lookup(prompt(seed, PROMPT))
        assert found == 0 or seed in self.known
        self._note_losses()
        if seed in self.below | self.saved() and not self.tier.fails:
            assert found == PROMPT

    def saved(self) -> set[int]:
        """With write-back what the pool loses is written first."""
        return self.kept if self.policy == "write-back" else set()

    @rule(seed=seeds)
    def evict(self, seed: int) -> None:
        """The pool loses a prompt, the tier keeps what it has."""
        self.pool.observer.remove(CHAIN.keys(prompt(seed, PROMPT), CHUNK))
        self.kept.discard(seed)
        self.aged.discard(seed)

    @rule(seed=seeds)
    def remove(self, seed: int) -> None:
        keys = CHAIN.keys(prompt(seed, PROMPT), CHUNK)
        self.engine.remove(keys)
        self.tier.remove(keys)  # a tier may be left alone just now; what it keeps then is allowed
        for seeds in (self.known, self.below, self.kept, self.aged):
            seeds.discard(seed)

    @rule()
    def clear(self) -> None:
        self.engine.clear()
        self.tier.clear()
        for seeds in (self.known, self.below, self.kept, self.aged):
            seeds.clear()

    @rule(seed=seeds)
    def expire(self, seed: int) -> None:
        """The tier's copy of a prompt reaches its age."""
        for key in CHAIN.keys(prompt(seed, PROMPT), CHUNK):
            kept = self.tier._kept.get(key)
            if kept is not None:
                self.tier._kept[key] = kept._replace(expires_ms=1)
        self.below.discard(seed)
        self.kept.discard(seed)
        self.aged.add(seed)

    @rule(fails=st.booleans())
    def mood(self, fails: bool) -> None:
        self.tier.fails = fails
        if not fails:
            self._close_breaker()

    @invariant()
    def nothing_leaks(self) -> None:
        self.pool.check()

    def teardown(self) -> None:
        try:
            self.engine.close()
            if self.lender is not None and self.lending is not None:
                self.lender.close()
                self.lending.close()
            self.pool.assert_nothing_leaks()
        finally:
            self.pool.__exit__(None, None, None)


class WriteBack(PoolAndTier):
    """The tier gets what the pool evicts."""

    policy = "write-back"


class ThreeStoreys(WriteBack):
    """And the pool evicts to a rank of its own first."""

    under = 6


TestPoolAndTier = PoolAndTier.TestCase
TestWriteBack = WriteBack.TestCase
TestThreeStoreys = ThreeStoreys.TestCase
for each in (TestPoolAndTier, TestWriteBack, TestThreeStoreys):
    each.settings = settings(max_examples=8, stateful_step_count=40, deadline=None)
