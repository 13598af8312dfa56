"""One request as the scheduler's half sees it, from its arrival to its end."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from integration.vllm.saves import Captured
from integration.vllm.search import Pinned


@dataclass
class Tracked:
    """What is known of a request beside what vLLM says.

    adapter: the identity of its LoRA adapter, "" without one. search: a question to the pool under way.
    pinned: what it may load. missed_at_s: when the pool had nothing for it last. fetch: the order to bring
    chunks up from lower tiers that it waits for; fetched_from: the first chunk of its last such order, -1 if
    there was none since it was admitted; fetch_deadline_s: until when it waits for all of them.
    computed_tokens: what vLLM has itself. limit: the first chunk that did not arrive, of which on nothing is
    loaded for it. loaded: chunks that come from the pool. captured_to, captured: chunks on their way there.
    first_scheduled, scheduled: its tokens in the first step since it was admitted last, and in all of them.
    barred: until it is admitted anew nothing of it is stored.
    """

    request: Any
    adapter: str
    search: Future[Pinned] | None = None
    pinned: Pinned | None = None
    missed_at_s: float = float("-inf")
    fetch: int | None = None
    fetched_from: int = -1
    fetch_deadline_s: float = float("-inf")
    computed_tokens: int = 0
    limit: int | None = None
    loaded: range = range(0)
    captured_to: int = 0
    captured: list[Captured] = field(default_factory=list)
    first_scheduled: int = 0
    scheduled: int = 0
    barred: bool = False

    def admitted(self) -> None:
        """vLLM begins with it, perhaps once more: all before is void. What is captured is to be dropped
        first.
        """
        assert not self.captured
        self.loaded = range(0)
        self.captured_to = self.first_scheduled = self.scheduled = 0
        self.fetched_from = -1
        self.barred = False

    def stepped(self, tokens: int) -> None:
        """So many of its tokens are in the step that vLLM has just scheduled."""
        self.first_scheduled = self.first_scheduled or tokens
        self.scheduled += tokens

    @property
    def processed(self) -> int:
        """Its tokens of steps that have come back."""
        return int(self.request.num_computed_tokens - self.request.num_in_flight_tokens)

    @property
    def is_confirmed(self) -> bool:
        """Whether the step that admitted it, and with it what it found or loaded, came back well."""
        came_back = self.scheduled - self.request.num_in_flight_tokens
        return bool(self.first_scheduled) and came_back >= self.first_scheduled

    def let_go(self) -> None:
        """Hold nothing of the pool any more that is not being loaded."""
        if self.search is not None:
            self.search.add_done_callback(lambda done: done.result().release())
            self.search = None
        if self.pinned is not None:
            self.pinned.release()
            self.pinned = None
