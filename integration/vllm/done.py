"""What a worker's threads have finished and vLLM has not heard of, and how much is under way."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from integration.vllm.messages import Identity, Report

_IDLE_WAIT_S = 0.01
"""A step that computes nothing waits so long for a load: a request that comes meanwhile waits no longer."""

_IDLE_WAIT_SAVE_S = 0.001
"""And for a save, which nobody waits for: only so that the engine does not spin."""


class Work(Enum):
    """What threads do; the forgetting of lower tiers is a fetch."""

    LOAD = "load"
    SAVE = "save"
    FETCH = "fetch"


@dataclass
class Finished:
    """What vLLM is to hear. received, failed: requests that loaded asynchronously. bad_blocks: not filled by
    other loads.
    """

    report: Report = field(default_factory=Report)
    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    bad_blocks: set[int] = field(default_factory=set)


class Done:
    """The books of one worker. Thread-safe; `take`, `bad_blocks` and `report` are of vLLM's thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: Counter[Work] = Counter()
        self._finished = Finished()
        self._taken = Finished()

    def begin(self, work: Work, count: int = 1) -> None:
        """So much more is under way."""
        with self._changed:
            self._running[work] += count

    @contextmanager
    def end(self, work: Work) -> Iterator[Finished]:
        """One is through, and says in this block what has come of it."""
        with self._changed:
            self._running[work] -= 1
            yield self._finished
            self._changed.notify_all()

    def running(self, work: Work) -> int:
        """How many are under way."""
        return self._running[work]

    def tell(self, identity: Identity) -> None:
        """Say who this rank is."""
        with self._changed:
            self._finished.report.identities[identity.place] = identity

    def take(self, *, is_idle: bool) -> KVConnectorTransferResults:
        """What arrived or failed since the last call. is_idle: wait a little for more if there is nothing."""
        with self._changed:
            awaited = self._running[Work.LOAD] or self._running[Work.FETCH]
            if is_idle and not self._finished.report and (awaited or self._running[Work.SAVE]):
                patience_s = _IDLE_WAIT_S if awaited else _IDLE_WAIT_SAVE_S
                self._changed.wait_for(lambda: bool(self._finished.report), patience_s)
            taken, self._finished = self._finished, Finished()
        self._taken = taken
        return KVConnectorTransferResults(finished_recving=taken.received, failed_recving=taken.failed)

    def bad_blocks(self) -> set[int]:
        """Blocks that synchronous loads did not fill; of what `take` took."""
        return self._taken.bad_blocks

    def report(self) -> Report | None:
        """What the scheduler's half has to know; of what `take` took, once."""
        taken, self._taken = self._taken, Finished()
        return taken.report if taken.report else None
