"""The scheduler's half: what a request may load, and what becomes of each of vLLM's steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from typing import Any

from integration.vllm.captures import Captures, Tables
from integration.vllm.events import StoredEvents
from integration.vllm.fetches import Fetches
from integration.vllm.groups import Groups, places_of
from integration.vllm.keys import ChunkKeys
from integration.vllm.loads import Loads
from integration.vllm.messages import Identity, Orders, Place, Report
from integration.vllm.saves import PagePins
from integration.vllm.search import Searches, Wanted, chunks_at_most
from integration.vllm.settings import Configured, Settings
from integration.vllm.stats import Observed
from integration.vllm.tracked import Tracked
from vcache.client import Client
from vcache.engine.stats import Cause, Counters
from vcache.errors import ArgumentError, ServerError, Unavailable
from vcache.keys import namespace
from vcache.logs import Line
from vcache.tiers.configured import tier_names

_log = logging.getLogger("vcache.integration.vllm")

_ASK_AGAIN_S = 0.25
"""A request that waits for blocks is asked about in every step; the pool, after a miss, this often."""

_PINNED_SHARE_MAX = 0.5
"""Of vLLM's blocks, how many may be pinned by saves: the others still serve requests."""


class SchedulerHalf:
    """Answers vLLM's scheduler. Used by one thread, which asks the pool itself and waits up to a deadline."""

    def __init__(
        self,
        client: Client,
        groups: Groups,
        keys: ChunkKeys,
        searches: Searches,
        settings: Settings,
        counters: Counters,
        *,
        pins: PagePins,
        events: StoredEvents,
        ranks: int,
        places: int = 1,
        loads_at_all: bool = True,
        stores_at_all: bool = True,
        load_async: bool = False,
        has_tiers: bool = False,
    ) -> None:
        """ranks: workers, that all have to report. places: ranks that have chunks of their own."""
        self._client = client
        self._groups = groups
        self._keys = keys
        self._searches = searches
        self._counters = counters
        self._lookup_deadline_s = self._patience_s = settings.lookup_deadline_ms / 1e3
        self._loads_at_all = loads_at_all
        self.observed = Observed(counters)
        self._pins = pins
        self._captures = Captures(
            groups,
            keys,
            pins,
            events,
            counters,
            store=stores_at_all,
            store_generated=settings.store_generated,
            ranks=ranks,
        )
        self._loads = Loads(
            groups, keys, pins, self._captures, self.observed, is_async=load_async, ranks=ranks
        )
        patience_s = settings.fetch_deadline_ms / 1e3
        self._fetches = Fetches(groups, keys, enabled=has_tiers, ranks=ranks, patience_s=patience_s)
        self._chunks_max = chunks_at_most(groups, places)
        self._tracked: dict[str, Tracked] = {}
        self._owes_clear = False

    @classmethod
    def of(
        cls, vllm_config: Any, groups: Groups, configured: Configured, *, load_async: bool
    ) -> SchedulerHalf:
        """The half that a configuration asks for; it joins the pool."""
        settings, transfer = configured.settings, vllm_config.kv_transfer_config
        client = Client(configured.config, name=f"vllm-scheduler-{transfer.engine_id}"[:60])
        keys = ChunkKeys(vllm_config, groups, private=_private(settings.private, vllm_config))
        counters = Counters()
        return cls(
            client,
            groups,
            keys,
            Searches(client, groups, keys, counters),
            settings,
            counters,
            pins=PagePins(_PINNED_SHARE_MAX),
            events=StoredEvents.of(vllm_config, groups),
            ranks=vllm_config.parallel_config.world_size,
            places=len(places_of(groups, vllm_config.parallel_config)),
            loads_at_all=transfer.is_kv_consumer,
            stores_at_all=transfer.is_kv_producer and settings.store,
            load_async=load_async,
            has_tiers=bool(tier_names(configured.config)),
        )

    # -- beginning and end

    def bind_block_pool(self, block_pool: Any) -> None:
        """vLLM's block pool, in which pages of saves are pinned."""
        self._pins.block_pool = block_pool

    def hear(self, identities: dict[Place, Identity]) -> None:
        """Workers have said what their chunks are."""
        self._keys.hear(identities)

    def close(self) -> None:
        """Leave the pool; what is pinned there ends with the session."""
        self._searches.close()
        self._client.close()

    def new_request(self, request: Any) -> None:
        """A request has arrived."""
        if request.request_id in self._tracked:  # a streaming session goes on
            return
        lora = request.lora_request
        if lora is not None and lora.load_inplace:
            return  # its weights change under its name
        try:
            self._tracked[request.request_id] = Tracked(request, self._keys.adapter(request))
        except (ArgumentError, OSError) as error:
            self._counters.failed(Cause.REFUSED, f"a LoRA adapter cannot be identified: {error}")

    def finished(self, request: Any, tables: Tables) -> None:
        """A request is over; its blocks are still there."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return
        self._let_go(tracked)
        if tracked.is_confirmed:
            try:
                chunks = self._captures.completed(tracked, tracked.processed)
                self._captures.capture(tracked, chunks, tables, self._loads.arriving())
                self._captures.confirm(tracked)
            finally:
                self._captures.drop(tracked)
        self._captures.drop(tracked)

    # -- hits

    def matched_tokens(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """(tokens beyond `computed_tokens` that can be loaded, whether asynchronously); None: ask again."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or not self._loads_at_all or request.skip_reading_prefix_cache:
            return 0, False
        tracked.computed_tokens = computed_tokens
        first = computed_tokens // self._groups.chunk_tokens
        end = self._end_of_hits(tracked, first)
        if tracked.pinned is not None and not tracked.pinned.hit.first <= first < tracked.pinned.hit.end:
            self._let_go(tracked)
        if end <= first:
            self._let_go(tracked)
            return 0, False
        if not self._is_known(tracked, first, end):
            return None, False
        pinned = tracked.pinned
        if pinned is None or not pinned.hit.first <= first < pinned.hit.end:
            self._let_go(tracked)
            return 0, False
        return pinned.hit.end * self._groups.chunk_tokens - computed_tokens, self._loads.is_async

    def _end_of_hits(self, tracked: Tracked, first: int) -> int:
        """The first chunk that cannot be a hit: the last token is computed in any case."""
        request = tracked.request
        end: int = min(
            (request.num_tokens - 1) // self._groups.chunk_tokens,
            len(request.block_hashes) // self._groups.hashes_per_chunk,
            first + self._chunks_max,
        )
        if tracked.limit is not None:
            end = min(end, tracked.limit)
        return self._loads.failures.first(self._groups, request, range(first, end))

    def _is_known(self, tracked: Tracked, first: int, end: int) -> bool:
        """Whether it is known by now what the pool has of chunks `first` … `end` - 1; if something, it is
        pinned.
        """
        if tracked.fetch is not None:
            brought = self._fetches.outcome(tracked)
            if brought is None:
                return False
            if not brought:
                return True
            self._let_go(tracked)  # there is more now
            tracked.missed_at_s = float("-inf")
        if tracked.pinned is not None:
            return True
        searched = tracked.search is not None or self._begin_search(tracked, first, end)
        if not searched:
            return True
        if not self._has_answer(tracked):
            return False
        there = first if tracked.pinned is None else tracked.pinned.hit.end
        # What is fetched goes into the pool: not if the search has just found nobody there.
        return not (self._client.connected and self._fetches.begin(tracked, there, end))

    def _begin_search(self, tracked: Tracked, first: int, end: int) -> bool:
        """Ask the pool, if it is time to; whether it was asked."""
        again = time.monotonic() - tracked.missed_at_s >= _ASK_AGAIN_S
        if not again or not self._keys.complete:
            return False
        if not self._client.connected:
            self._counters.failed(Cause.NO_SERVER, "there is no connection to the metadata server")
            tracked.missed_at_s = time.monotonic()
            return False
        if self._owes_clear or self._fetches.busy:  # what was there before a reset may still be there
            tracked.missed_at_s = time.monotonic()
            return False
        hashes = tuple(tracked.request.block_hashes[: end * self._groups.hashes_per_chunk])
        wanted = Wanted(hashes, first, end, tracked.adapter)
        with self._waiting():
            tracked.search = self._searches.begin(wanted, self._patience_s)
        return True

    def _has_answer(self, tracked: Tracked) -> bool:
        """Take a search's answer; False if there is none yet."""
        assert tracked.search is not None
        try:
            with self._waiting():
                pinned = tracked.search.result(self._patience_s)
        except NotYet:
            return False
        tracked.search = None
        if pinned.hit.end > pinned.hit.first:
            tracked.pinned = pinned
        else:
            tracked.missed_at_s = time.monotonic()
        return True

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """There is one deadline for all requests of a step."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            self._patience_s = max(0.0, self._patience_s - (time.monotonic() - started_s))

    def _let_go(self, tracked: Tracked) -> None:
        self._fetches.leave(tracked)
        tracked.let_go()

    # -- steps

    def allocated(self, request: Any, tables: Tables, external_tokens: int) -> None:
        """vLLM has given the request blocks: load `external_tokens` into them, or nothing."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return
        if request.num_computed_tokens == 0:
            self._captures.drop(tracked)
            tracked.admitted()
        pinned, tracked.pinned = tracked.pinned, None
        if not external_tokens:
            if pinned is not None:
                pinned.release()
            return
        begin = tracked.computed_tokens
        pinned = pinned or self._searches.nothing(begin // self._groups.chunk_tokens)
        self._loads.order(tracked, pinned, tables, range(begin, begin + external_tokens))

    def orders(self, step: Any) -> Orders:
        """What the workers are to do with this step of vLLM's scheduler."""
        try:
            self._loads.note_sharers(step, self._tracked)
            self._captures.confirm_all(self._tracked.values())
            self._capture_step(step)
        except Exception:  # nothing is stored then; but loads must not get lost, for vLLM counts on them
            _log.exception("saves were given up")
        if self._owes_clear and self._keys.complete and self._client.connected:
            self._cleared()
        fetches, forget = self._fetches.take_orders()
        self._patience_s = self._lookup_deadline_s
        return Orders(
            loads=self._loads.take_orders(),
            saves=self._captures.take_orders(),
            fetches=fetches,
            idle=not step.total_num_scheduled_tokens,
            tell=not self._keys.complete,
            forget=forget,
        )

    def _capture_step(self, step: Any) -> None:
        arriving = self._loads.arriving()
        for request_id, tokens in step.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            chunks = self._captures.completed(tracked, tracked.request.num_computed_tokens + tokens)
            tables = step.kv_connector_block_state.get_block_ids(request_id) if chunks else None
            if tables is not None:
                self._captures.capture(tracked, chunks, tables, arriving)
            tracked.stepped(tokens)

    def reported(self, report: Report | None) -> None:
        """The workers have come through a step. What one part cannot make of it is not lost to the others."""
        if report is not None:
            with _apart("identities"):
                self.hear(report.identities)
            with _apart("loads"):
                self._loads.reported(report, self._tracked)
            with _apart("saves"):
                self._captures.reported(report)
            with _apart("fetches"):
                self._fetches.reported(report)
        self._captures.confirm_all(self._tracked.values())

    # -- everything else

    @property
    def busy(self) -> bool:
        """Whether workers have to be heard although no request needs them."""
        return self._captures.busy or self._fetches.busy

    @property
    def frees_blocks(self) -> bool:
        """Whether blocks come back soon: those that only pins of ours keep. What running requests have, too,
        stays theirs when it is stored, and nobody is to wait for it.
        """
        return self._pins.frees_blocks

    def reset(self) -> bool:
        """Never find again what was stored until now; False if that cannot be promised now.

        Without a server the pool is emptied in the first step with one, and nothing is loaded before.
        """
        for tracked in self._tracked.values():
            self._let_go(tracked)
        if self._loads or (self._captures.busy and not self._keys.private):
            _log.warning("the pool was not reset: blocks are on their way to or from it; try again")
            return False
        if self._keys.private:
            self._keys.rotate()
        elif not self._keys.complete or not self._cleared():
            self._owes_clear = True
            self._fetches.forget()
        for tracked in self._tracked.values():  # what they have computed is of before
            self._captures.bar(tracked)
        return True

    def _cleared(self) -> bool:
        """Empty the pool of this model, and the tiers below; False if that is still owed."""
        try:
            cleared = self._client.clear(namespace(self._keys.model))
        except (Unavailable, ServerError) as error:
            if not self._owes_clear:
                _log.warning("the pool is reset once there is a server, and nothing loaded before: %s", error)
            return False
        self._owes_clear = False
        self._fetches.forget()
        _log.info(Line("the pool was reset", model=self._keys.model, chunks=cleared))
        return True

    def take_events(self) -> list[Any]:
        """KV events since the last call."""
        return self._captures.take_events()


@contextmanager
def _apart(part: str) -> Iterator[None]:
    """What is raised inside stays there, as a line in the log."""
    try:
        yield
    except Exception:
        _log.exception("what workers said of %s was not understood", part)


def _private(wanted: str, vllm_config: Any) -> bool:
    """Whether weights may change in place, so that keys have to be this engine's own."""
    if wanted != "auto":
        return wanted == "yes"
    changes = getattr(vllm_config, "weight_transfer_config", None) is not None
    return changes or bool(getattr(vllm_config.model_config, "enable_sleep_mode", False))
