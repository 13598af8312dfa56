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

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool()
        self.pool.start_server()
        self.tier = Moody()
        given: dict[str, Any] = {"device": "shm:0", "segment.size": 4096 + 10 * 8192, "tiers.prefetch": False}
        self.engine = VCacheEngine(
            layout=LAYOUT,
            model="test-model",
            kv_axes=AXES,
            tiers=[self.tier],
            **{**self.pool.client_config(), **given},
        )
        assert self.engine.wait_connected(DEADLINE_S)
        self.below: set[int] = set()
        """Prompts all of whose chunks the tier has for certain."""
        self.known: set[int] = set()
        """Prompts that were ever stored and not forgotten since."""

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

    @rule(seed=seeds)
    def retrieve(self, seed: int) -> None:
        paged = PagedPrompt(seed, PROMPT)
        loaded = self.engine.retrieve(paged.tokens, kvcaches=paged.kvcaches, slot_mapping=paged.slots)
        assert paged.wrong_tokens(loaded) == 0
        hit = int(loaded.sum())
        assert hit == 0 or seed in self.known
        if seed in self.below and not self.tier.fails:
            assert hit == PROMPT

    @rule(seed=seeds)
    def look(self, seed: int) -> None:
        found = self.engine.lookup(prompt(seed, PROMPT))
        assert found == 0 or seed in self.known
        if seed in self.below and not self.tier.fails:
            assert found == PROMPT

    @rule(seed=seeds)
    def evict(self, seed: int) -> None:
        """The pool loses a prompt, the tier keeps what it has."""
        self.pool.observer.remove(CHAIN.keys(prompt(seed, PROMPT), CHUNK))

    @rule(seed=seeds)
    def remove(self, seed: int) -> None:
        keys = CHAIN.keys(prompt(seed, PROMPT), CHUNK)
        self.engine.remove(keys)
        self.tier.remove(keys)  # a tier may be left alone just now; what it keeps then is allowed
        self.known.discard(seed)
        self.below.discard(seed)

    @rule()
    def clear(self) -> None:
        self.engine.clear()
        self.tier.clear()
        self.known.clear()
        self.below.clear()

    @rule(seed=seeds)
    def expire(self, seed: int) -> None:
        """The tier's copy of a prompt reaches its age."""
        for key in CHAIN.keys(prompt(seed, PROMPT), CHUNK):
            kept = self.tier._kept.get(key)
            if kept is not None:
                self.tier._kept[key] = kept._replace(expires_ms=1)
        self.below.discard(seed)

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
            self.pool.assert_nothing_leaks()
        finally:
            self.pool.__exit__(None, None, None)


TestPoolAndTier = PoolAndTier.TestCase
TestPoolAndTier.settings = settings(max_examples=12, stateful_step_count=40, deadline=None)
