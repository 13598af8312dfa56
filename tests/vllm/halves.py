"""The connector's two halves over stand-ins for what is beyond them: the pool, and the copies."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.request import RequestStatus

from integration.vllm.events import StoredEvents
from integration.vllm.groups import Group, Groups
from integration.vllm.keys import ChunkKeys
from integration.vllm.messages import Identity, Orders, Save
from integration.vllm.saves import PagePins
from integration.vllm.scheduler import SchedulerHalf
from integration.vllm.search import Hit, Pinned
from integration.vllm.settings import Settings
from integration.vllm.worker import WorkerHalf, _GroupHalf
from vcache.engine.stats import Counters
from vcache.errors import Unavailable
from vcache.protocol import EXTENT

BLOCK = 16
PLACE = (0, 0)
GROUPS = Groups((Group(0, BLOCK, 0, ("first", "second"), None),), BLOCK, BLOCK)


class Pool:
    """Stands for the metadata server: there, and empty. answers: whether it does."""

    def __init__(self) -> None:
        self.connected = self.answers = True
        self.clears = 0

    def clear(self, namespace: bytes) -> int:
        """Nothing was there."""
        if not self.connected or not self.answers:
            raise Unavailable("nobody is there")
        self.clears += 1
        return 0


class Scheduling(SchedulerHalf):
    """The scheduler's half over vLLM's block pool; its searches find what the test says."""

    def __init__(
        self,
        *,
        private: bool = False,
        has_tiers: bool = False,
        load_async: bool = False,
        stores: bool = True,
    ) -> None:
        self.pool: Any = Pool()
        self.pages = PagePins(0.5, BlockPool(64, True, BLOCK))
        self.answers: list[tuple[int, int]] = []
        searches: Any = SimpleNamespace(nothing=found, begin=self._begin)
        super().__init__(
            self.pool,
            GROUPS,
            made_keys(private=private),
            searches,
            Settings(lookup_deadline_ms=0),
            Counters(),
            pins=self.pages,
            events=StoredEvents(GROUPS, enabled=False),
            ranks=1,
            stores_at_all=stores,
            load_async=load_async,
            has_tiers=has_tiers,
        )
        self.saves: list[Save] = []
        self.tables_read: list[str] = []

    def _begin(self, wanted: Any, within_s: float) -> Future[Pinned]:
        """A search, answered at once: with the chunks that `answers` says next, else with nothing."""
        done: Future[Pinned] = Future()
        done.set_result(found(*(self.answers.pop(0) if self.answers else (wanted.first,))))
        return done

    @property
    def blocks(self) -> BlockPool:
        """vLLM's."""
        return self.pages.block_pool  # type: ignore[no-any-return]

    def pages_saved(self) -> set[int]:
        """Pages of all saves that are ordered and no step has taken along."""
        self.saves += self._captures.take_orders()
        return {page for save in self.saves for part in save.parts for page in part.pages}

    def admit(self, request: Any, table: list[int], external_tokens: int = 0) -> None:
        """A request arrives and is given blocks."""
        if request.request_id not in self._tracked:
            self.new_request(request)
        if external_tokens:
            self._tracked[request.request_id].pinned = found(0, external_tokens // BLOCK)
        self.allocated(request, (table,), external_tokens)

    def cache(self, request: Any, table: list[int], count: int) -> None:
        """vLLM's prefix cache has the first blocks of a request."""
        blocks = [self.blocks.blocks[page] for page in table]
        self.blocks.cache_full_blocks(request, blocks, 0, count, BLOCK, 0)

    def cached(self, request: Any, count: int) -> list[bool]:
        """Which of the first blocks of a request vLLM's prefix cache has."""
        cached = self.blocks.cached_block_hash_to_block
        found = (make_block_hash_with_group_id(each, 0) for each in request.block_hashes[:count])
        return [cached.get_one_block(each) is not None for each in found]

    def step(self, tables: dict[str, list[int]], **tokens: int) -> Orders:
        """vLLM has scheduled so many tokens of these requests."""

        def get_block_ids(request: str) -> tuple[list[int]]:
            self.tables_read.append(request)
            return (tables[request],)

        state = SimpleNamespace(get_block_ids=get_block_ids)
        orders = self.orders(
            SimpleNamespace(
                total_num_scheduled_tokens=sum(tokens.values()),
                num_scheduled_tokens=tokens,
                kv_connector_block_state=state,
            )
        )
        self.saves = []
        for name, count in tokens.items():
            request = self._tracked[name].request
            request.num_computed_tokens += count
            request.num_in_flight_tokens += count
        return orders


def made_keys(*, private: bool = False) -> ChunkKeys:
    """Keys of one rank."""
    made = object.__new__(ChunkKeys)
    made._vllm_config, made._groups, made._places = None, GROUPS, {PLACE}
    made._private = private
    made._nonce = secrets.token_bytes(16) if private else b""
    made._chains, made._loras = {}, {}
    made.identities = {PLACE: Identity(PLACE, "model", (b"f" * 16,), ("identity",), (64,))}
    return made


def found(first: int, end: int | None = None) -> Pinned:
    """A hit, without pins."""
    end = first if end is None else end
    searches: Any = SimpleNamespace(give_back=lambda grants: None)
    return Pinned(searches, Hit(first, end, {(PLACE, 0): np.zeros(end - first, EXTENT)}, 1), [])


def request_of(name: str, tokens: int) -> Any:
    """A request whose prompt begins as all others do."""
    return SimpleNamespace(
        request_id=name,
        num_tokens=tokens,
        num_prompt_tokens=tokens,
        num_computed_tokens=0,
        num_in_flight_tokens=0,
        status=RequestStatus.RUNNING,
        block_hashes=[bytes([at]) * 32 for at in range(tokens // BLOCK)],
        lora_request=None,
        skip_reading_prefix_cache=False,
        all_token_ids=list(range(tokens)),
    )


class Lane:
    """A lane whose events the test tells apart, or which fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.events: list[object] = []
        self.error = error

    def on(self, device: Any) -> Lane:
        """Of any device."""
        return self

    def caller(self) -> Any:
        """A new event each time."""
        if self.error is not None:
            raise self.error
        self.events.append(object())
        return self.events[-1]


class Working(WorkerHalf):
    """The worker's half over a copy that only writes down what it was asked for."""

    def __init__(
        self,
        *,
        layerwise: bool = False,
        lane: Lane | None = None,
        groups: Groups = GROUPS,
        below: Sequence[Any] = (None,),
    ) -> None:
        """below: of each group."""
        kv_cache_config: Any = SimpleNamespace(num_blocks=64)
        configured: Any = SimpleNamespace(settings=Settings(layerwise=layerwise))
        super().__init__(None, kv_cache_config, groups, configured)
        self.lane = lane or Lane()
        self._lanes: Any = self.lane
        self.transfers: list[Any] = []
        self.held = threading.Event()
        self.held.set()
        layout = SimpleNamespace(chunk_bytes=64, pages_per_chunk=1)
        paged = SimpleNamespace(layout=layout, device=None, layers=[0])
        for group, tiers in zip(groups, below, strict=True):
            pages: Any = SimpleNamespace(paged=paged, layer_names=group.layer_names)
            self._halves.append(_GroupHalf(pages, self, self))  # type: ignore[arg-type]
            self._fetcher.belows.append(tiers)

    def settle(self) -> None:
        """Return when all that was to be fetched is."""
        self._fetcher.settle()

    def run(self, transfer: Any, extents: bytes = b"", lineage: int = 0, on_layer: Any = None) -> Any:
        """Stands for GrantedLoads, whose first chunk does not arrive, and for Store."""
        assert self.held.wait(30)
        self.transfers.append(transfer)
        return [False] * len(transfer.keys) if extents else len(transfer.keys)
