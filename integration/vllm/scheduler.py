"""The scheduler's half: what a request may load, what is to be stored, and who still holds what."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.request import RequestStatus

from integration.vllm.events import StoredEvents
from integration.vllm.groups import Groups, places_of
from integration.vllm.keys import ChunkKeys
from integration.vllm.messages import Identity, Load, LoadPart, Orders, Place, Report, Save, SavePart
from integration.vllm.saves import NULL_PAGE, Captured, PagePins, pages_of_chunk
from integration.vllm.search import Pinned, Searches, Wanted, chunks_at_most
from integration.vllm.settings import Configured
from integration.vllm.stats import Observed
from vcache.client import Client
from vcache.engine.stats import Cause, Counters
from vcache.errors import ArgumentError, ServerError, Unavailable
from vcache.keys import namespace
from vcache.logs import Line

_log = logging.getLogger("vcache.integration.vllm")

_ASK_AGAIN_S = 0.25
"""A request that waits for blocks is asked about in every step; the pool, after a miss, this often."""

_FAILED_MISS_S = 30.0
"""How long a chunk that failed to load counts as a miss for all requests: what ails a holder lasts a while.
"""

_FAILED_MAX = 65_536
"""Chunks remembered as such."""

_PINNED_SHARE_MAX = 0.5
"""Of vLLM's blocks, how many may be pinned by saves: the others still serve requests."""


@dataclass
class _Tracked:
    """One request, from its arrival to its end. scheduled: its tokens in steps since it was last admitted.

    barred: until it is admitted anew nothing of it is stored.
    """

    request: Any
    adapter: str
    search: Future[Pinned] | None = None
    pinned: Pinned | None = None
    missed_at_s: float = float("-inf")
    computed_tokens: int = 0
    limit: int | None = None
    loaded: range = range(0)
    captured_to: int = 0
    captured: list[Captured] = field(default_factory=list)
    first_scheduled: int = 0
    scheduled: int = 0
    barred: bool = False


@dataclass
class _Loading:
    """A load that workers carry out, under a pin.

    pages: of each chunk, which ones it fills. sharers: of other requests that have hit some of these in
    vLLM's own prefix cache, the pages from the first such one on.
    """

    request: Any
    pinned: Pinned
    ranks: int
    pages: dict[int, set[int]]
    failed: int | None = None
    sharers: dict[str, set[int]] = field(default_factory=dict)

    def pages_from(self, chunk: int) -> set[int]:
        """Those of this chunk and of later ones."""
        return {page for number, pages in self.pages.items() if number >= chunk for page in pages}


class SchedulerHalf:
    """Answers vLLM's scheduler. Used by one thread; what it asks of the pool is asked by others."""

    def __init__(self, vllm_config: Any, groups: Groups, configured: Configured, *, load_async: bool) -> None:
        settings = configured.settings
        transfer = vllm_config.kv_transfer_config
        self._groups = groups
        self._settings = settings
        self._load_async = load_async
        self._patience_s = settings.lookup_deadline_ms / 1e3
        self._loads_at_all = transfer.is_kv_consumer
        self._stores_at_all = transfer.is_kv_producer and settings.store
        self._ranks = vllm_config.parallel_config.world_size
        self._counters = Counters()
        self.observed = Observed(self._counters)
        self._client = Client(configured.config, name=f"vllm-scheduler-{transfer.engine_id}"[:60])
        self._keys = ChunkKeys(vllm_config, groups, private=_private(settings.private, vllm_config))
        self._searches = Searches(self._client, groups, self._keys, self._counters)
        self._pins = PagePins(_PINNED_SHARE_MAX)
        self._events = StoredEvents.of(vllm_config, groups)
        self._chunks_max = chunks_at_most(groups, len(places_of(groups, vllm_config.parallel_config)))
        self._tracked: dict[str, _Tracked] = {}
        self._loading: dict[int, _Loading] = {}
        self._last_load = 0
        self._new_loads: list[Load] = []
        self._new_saves: list[Save] = []
        self._failed: OrderedDict[bytes, float] = OrderedDict()

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
            self._tracked[request.request_id] = _Tracked(request, self._keys.adapter(request))
        except (ArgumentError, OSError) as error:
            self._counters.failed(Cause.REFUSED, f"a LoRA adapter cannot be identified: {error}")

    def finished(self, request: Any, tables: Sequence[Sequence[int]]) -> None:
        """A request is over; its blocks are still there."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return
        self._let_go(tracked)
        if self._is_confirmed(tracked):
            processed = request.num_computed_tokens - request.num_in_flight_tokens
            self._capture(tracked, processed, tables)
            self._confirm(tracked)
        self._drop(tracked)

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
        if tracked.pinned is None and not self._ask(tracked, first, end):
            return None, False
        pinned = tracked.pinned
        if pinned is None or not pinned.hit.first <= first < pinned.hit.end:
            self._let_go(tracked)
            return 0, False
        return pinned.hit.end * self._groups.chunk_tokens - computed_tokens, self._load_async

    def _end_of_hits(self, tracked: _Tracked, first: int) -> int:
        """The first chunk that cannot be a hit: the last token is computed in any case."""
        request = tracked.request
        end: int = min(
            (request.num_tokens - 1) // self._groups.chunk_tokens,
            len(request.block_hashes) // self._groups.hashes_per_chunk,
            first + self._chunks_max,
        )
        if tracked.limit is not None:
            end = min(end, tracked.limit)
        if not self._failed:
            return end
        now = time.monotonic()
        for chunk in range(first, end):
            failed_at = self._failed.get(self._hash(request, chunk))
            if failed_at is not None and now - failed_at < _FAILED_MISS_S:
                return chunk
        return end

    def _ask(self, tracked: _Tracked, first: int, end: int) -> bool:
        """Search the pool, or look how far the search is; False if that is not known yet."""
        if tracked.search is None:
            again = time.monotonic() - tracked.missed_at_s >= _ASK_AGAIN_S
            if not again or not self._keys.complete:
                return True
            if not self._client.connected:
                self._counters.failed(Cause.NO_SERVER, "there is no connection to the metadata server")
                tracked.missed_at_s = time.monotonic()
                return True
            hashes = tuple(tracked.request.block_hashes[: end * self._groups.hashes_per_chunk])
            tracked.search = self._searches.begin(Wanted(hashes, first, end, tracked.adapter))
        started_s = time.monotonic()
        try:
            pinned = tracked.search.result(self._patience_s)
        except NotYet:
            return False
        finally:  # one deadline for all requests of a step
            self._patience_s = max(0.0, self._patience_s - (time.monotonic() - started_s))
        tracked.search = None
        if pinned.hit.end > pinned.hit.first:
            tracked.pinned = pinned
        else:
            tracked.missed_at_s = time.monotonic()
        return True

    def _hash(self, request: Any, chunk: int) -> bytes:
        return bytes(request.block_hashes[(chunk + 1) * self._groups.hashes_per_chunk - 1])

    def _let_go(self, tracked: _Tracked) -> None:
        """Hold nothing for this request any more that is not being loaded."""
        if tracked.search is not None:
            tracked.search.add_done_callback(lambda done: done.result().release())
            tracked.search = None
        if tracked.pinned is not None:
            tracked.pinned.release()
            tracked.pinned = None

    # -- loads

    def allocated(self, request: Any, tables: Sequence[Sequence[int]], external_tokens: int) -> None:
        """vLLM has given the request blocks: load `external_tokens` into them, or nothing."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return
        if request.num_computed_tokens == 0:  # admitted, or admitted once more: all before is void
            self._drop(tracked)
            tracked.loaded = range(0)
            tracked.captured_to = tracked.first_scheduled = tracked.scheduled = 0
            tracked.barred = False
        pinned, tracked.pinned = tracked.pinned, None
        if not external_tokens:
            if pinned is not None:
                pinned.release()
            return
        begin = tracked.computed_tokens
        end = begin + external_tokens
        pinned = pinned or self._searches.nothing(begin // self._groups.chunk_tokens)
        load = Load(
            self._last_load + 1,
            request.request_id,
            self._load_async,
            pinned.hit.lineage,
            self._parts_or_failure(pinned, tables, begin, end),
        )
        self._last_load = load.id
        self._loading[load.id] = _Loading(request, pinned, self._ranks, self._targets(tables, begin, end))
        self._new_loads.append(load)
        tracked.loaded = range(begin // self._groups.chunk_tokens, end // self._groups.chunk_tokens)
        self.observed.add(hit_tokens=external_tokens)

    def _targets(self, tables: Sequence[Sequence[int]], begin: int, end: int) -> dict[int, set[int]]:
        """Of each chunk, the pages that a load of tokens `begin` … `end` - 1 fills."""
        tokens = self._groups.chunk_tokens
        return {
            chunk: {
                page
                for at in range(len(self._groups))
                for page in self._pages(at, [chunk], tables, begin, end)
                if page >= 0
            }
            for chunk in range(begin // tokens, -(-end // tokens))
        }

    def _parts_or_failure(
        self, pinned: Pinned, tables: Sequence[Sequence[int]], begin: int, end: int
    ) -> dict[Place, tuple[LoadPart, ...]]:
        """What is to be loaded. vLLM counts on it by now: what cannot be said right is ordered to fail."""
        try:
            return {
                place: tuple(
                    self._load_part(pinned, place, at, tables, begin, end) for at in range(len(self._groups))
                )
                for place in self._keys.identities
            }
        except Exception:
            _log.exception("a load cannot be ordered")
            tokens = self._groups.chunk_tokens
            chunks = range(begin // tokens, -(-end // tokens))
            failing = tuple(
                LoadPart(at, tuple(chunks), tuple(self._pages(at, chunks, tables, begin, end)), b"", True)
                for at in range(len(self._groups))
            )
            return dict.fromkeys(self._keys.identities, failing)

    def _load_part(
        self,
        pinned: Pinned,
        place: Place,
        at: int,
        tables: Sequence[Sequence[int]],
        begin: int,
        end: int,
    ) -> LoadPart:
        """Which chunks of a group go to which pages: those of tokens `begin` … `end` - 1 with a block."""
        group = self._groups.groups[at]
        chunks, pages = [], []
        for chunk in pinned.hit.chunks(place, at):
            of_chunk = self._pages(at, [chunk], tables, begin, end)
            if max(of_chunk) >= 0:
                chunks.append(chunk)
                pages += of_chunk
        wanted = tables[group.index][begin // group.page_tokens : -(-end // group.page_tokens)]
        missing = sum(page != NULL_PAGE for page in wanted) != sum(page >= 0 for page in pages)
        extents = pinned.hit.extents(place, at, chunks)
        return LoadPart(at, tuple(chunks), tuple(pages), extents, missing)

    def _pages(
        self, at: int, chunks: Iterable[int], tables: Sequence[Sequence[int]], begin: int, end: int
    ) -> list[int]:
        """The blocks of these chunks, -1 for those that are not to be written."""
        group = self._groups.groups[at]
        table, tokens = tables[group.index], group.page_tokens
        per_chunk = group.pages_in(self._groups.chunk_tokens)
        numbers = [chunk * per_chunk + page for chunk in chunks for page in range(per_chunk)]
        return [
            table[page] if begin <= page * tokens < end and page < len(table) and table[page] else -1
            for page in numbers
        ]

    # -- saves

    def _capture(self, tracked: _Tracked, tokens: int, tables: Sequence[Sequence[int]]) -> None:
        """Pin the pages of chunks that are complete once `tokens` tokens are computed."""
        if tracked.barred or not self._stores_at_all or not self._keys.complete:
            return
        request = tracked.request
        if not self._settings.store_generated:
            tokens = min(tokens, request.num_prompt_tokens)
        groups = self._groups
        end = min(tokens // groups.chunk_tokens, len(request.block_hashes) // groups.hashes_per_chunk)
        of_groups = [tables[group.index] for group in groups.groups]
        per_chunk = [group.pages_in(groups.chunk_tokens) for group in groups.groups]
        arriving = {page for loading in self._loading.values() for page in loading.pages_from(0)}
        for chunk in range(tracked.captured_to, end):
            if chunk in tracked.loaded:
                continue
            captured = pages_of_chunk(chunk, of_groups, per_chunk)
            if captured is None:
                continue
            pages = captured.page_ids()
            if not arriving.isdisjoint(pages):  # another request loads it: it may fail, and is in the pool
                continue
            if not self._pins.room_for(len(pages)):
                self._counters.failed(Cause.ASYNC_LIMIT, "too many blocks wait to be stored to store more")
                continue
            self._pins.pin(pages)
            tracked.captured.append(captured)
        tracked.captured_to = max(tracked.captured_to, end)

    def _is_confirmed(self, tracked: _Tracked) -> bool:
        """Whether the step that admitted the request, and with it what it found or loaded, came back well."""
        processed = tracked.scheduled - tracked.request.num_in_flight_tokens
        return bool(tracked.first_scheduled) and processed >= tracked.first_scheduled

    def _confirm(self, tracked: _Tracked) -> None:
        """Have those captured chunks stored of which the steps that computed them came back well."""
        if not tracked.captured or not self._is_confirmed(tracked):
            return
        request = tracked.request
        processed = request.num_computed_tokens - request.num_in_flight_tokens
        ready = [
            each for each in tracked.captured if (each.chunk + 1) * self._groups.chunk_tokens <= processed
        ]
        if not ready:
            return
        tracked.captured = [each for each in tracked.captured if each not in ready]
        pages = [page for each in ready for page in each.page_ids()]
        note = self._events.note(request, [each.chunk for each in ready])
        save = self._pins.send(pages, self._ranks, note)
        self._new_saves.append(Save(save, self._save_parts(tracked, ready)))

    def _save_parts(self, tracked: _Tracked, ready: list[Captured]) -> tuple[SavePart, ...]:
        parts = []
        for at in range(len(self._groups)):
            of_group = [(each.chunk, pages) for each in ready if (pages := each.pages[at]) is not None]
            if not of_group:
                continue
            chunks = [chunk for chunk, _ in of_group]
            hashes = tracked.request.block_hashes
            keys = {
                place: tuple(self._keys.keys(hashes, chunks, at, place, tracked.adapter))
                for place in self._keys.identities
            }
            parts.append(SavePart(at, keys, tuple(page for _, pages in of_group for page in pages)))
        return tuple(parts)

    def _drop(self, tracked: _Tracked) -> None:
        """What was captured and not confirmed is not stored."""
        captured, tracked.captured = tracked.captured, []
        for each in captured:
            self._pins.unpin(each.page_ids())

    # -- steps

    def orders(self, step: Any) -> Orders:
        """What the workers are to do with this step of vLLM's scheduler."""
        try:
            self._note_sharers(step)
            self._confirm_all()
            self._capture_step(step)
        except Exception:  # nothing is stored then; but loads must not get lost, for vLLM counts on them
            _log.exception("saves were given up")
        orders = Orders(
            loads=self._new_loads,
            saves=self._new_saves,
            idle=not step.total_num_scheduled_tokens,
            tell=not self._keys.complete,
        )
        self._new_loads, self._new_saves = [], []
        self._patience_s = self._settings.lookup_deadline_ms / 1e3
        return orders

    def _note_sharers(self, step: Any) -> None:
        """Whoever hits blocks that are being loaded within the step computes upon them, too."""
        if self._load_async or not self._loading:  # those of asynchronous loads cannot be hit before the end
            return
        for request_id in step.num_scheduled_tokens:
            tables = step.kv_connector_block_state.get_block_ids(request_id) or ()
            for loading in self._loading.values():
                loaded = loading.pages_from(0)
                for group in self._groups.groups if tables else ():
                    table = tables[group.index]
                    first = next((at for at, page in enumerate(table) if page in loaded), len(table))
                    if first < len(table):
                        loading.sharers.setdefault(request_id, set()).update(table[first:])

    def _capture_step(self, step: Any) -> None:
        for request_id, tokens in step.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            tables = step.kv_connector_block_state.get_block_ids(request_id)
            if tables is not None:
                self._capture(tracked, tracked.request.num_computed_tokens + tokens, tables)
            tracked.first_scheduled = tracked.first_scheduled or tokens
            tracked.scheduled += tokens

    def _confirm_all(self) -> None:
        for tracked in self._tracked.values():
            if tracked.captured:
                if tracked.request.status == RequestStatus.PREEMPTED:
                    self._drop(tracked)  # its blocks are wanted by others
                else:
                    self._confirm(tracked)

    def reported(self, report: Report | None) -> None:
        """The workers have come through a step."""
        if report is not None:
            if report.identities:
                self.hear(report.identities)
            for load, ranks in report.loads.items():
                self._load_reported(load, ranks, report.failed.get(load))
            for save, ranks in report.saves.items():
                stored = report.stored.get(save, 0)
                job = self._pins.finish(save, ranks, stored)
                if job is not None and job.stored >= self._ranks:
                    self._events.stored(job.note)
        self._confirm_all()

    def _load_reported(self, load: int, ranks: int, failed: int | None) -> None:
        loading = self._loading.get(load)
        if loading is None:
            return
        loading.ranks -= ranks
        if failed is not None:
            loading.failed = failed if loading.failed is None else min(failed, loading.failed)
            self._remember_failure(loading.request, failed)
            self._forget_unfilled(loading, failed)
        if loading.ranks > 0:
            return
        del self._loading[load]
        loading.pinned.release()
        if loading.failed is not None:
            self.observed.add(failed_loads=1)
            _log.warning(Line("a load failed", request=loading.request.request_id, chunk=loading.failed))

    def _remember_failure(self, request: Any, chunk: int) -> None:
        """A chunk did not arrive: from it on nothing is loaded for this request, nor soon for others."""
        if chunk < len(request.block_hashes) // self._groups.hashes_per_chunk:
            self._failed[self._hash(request, chunk)] = time.monotonic()
        while len(self._failed) > _FAILED_MAX:
            self._failed.popitem(last=False)
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return
        tracked.limit = chunk if tracked.limit is None else min(chunk, tracked.limit)
        start, stop = tracked.loaded.start, tracked.loaded.stop
        tracked.loaded = range(start, max(start, min(chunk, stop)))
        tracked.captured_to = min(tracked.captured_to, chunk)
        for each in [each for each in tracked.captured if each.chunk >= chunk]:
            tracked.captured.remove(each)
            self._pins.unpin(each.page_ids())

    def _forget_unfilled(self, loading: _Loading, chunk: int) -> None:
        """Nobody finds in vLLM's own prefix cache what a load did not fill, or what was computed upon it, and
        nothing of those who did is stored. (vLLM looks after its running requests, not after aborted ones.)
        """
        if self._load_async:
            return
        pages = loading.pages_from(chunk)
        for request_id, shared in loading.sharers.items():
            if shared.isdisjoint(pages):
                continue
            pages = pages | shared - loading.pages_from(0)
            tracked = self._tracked.get(request_id)
            if tracked is not None and tracked.request is not loading.request:
                self._bar(tracked)
        self._pins.uncache(pages - {NULL_PAGE})

    def _bar(self, tracked: _Tracked) -> None:
        """Store nothing of it until it is admitted anew."""
        self._drop(tracked)
        tracked.barred = True

    # -- everything else

    @property
    def busy(self) -> bool:
        """Whether workers have to be heard although no request needs them."""
        return bool(self._new_saves or self._pins.in_flight)

    def reset(self) -> bool:
        """Never find again what was stored until now; False if that cannot be promised now."""
        for tracked in self._tracked.values():
            self._let_go(tracked)
        if self._loading or (self.busy and not self._keys.private):
            _log.warning("the pool was not reset: blocks are on their way to or from it; try again")
            return False
        if not self._clear():
            return False
        for tracked in self._tracked.values():  # what they have computed is of before
            self._bar(tracked)
        return True

    def _clear(self) -> bool:
        if self._keys.private:
            self._keys.rotate()
            return True
        if not self._keys.complete:
            return True
        try:
            cleared = self._client.clear(namespace(self._keys.model))
        except (Unavailable, ServerError) as error:
            _log.warning("the pool was not reset: %s", error)
            return False
        _log.info(Line("the pool was reset", model=self._keys.model, chunks=cleared))
        return True

    def take_events(self) -> list[Any]:
        """KV events since the last call."""
        return self._events.take()


def _private(wanted: str, vllm_config: Any) -> bool:
    """Whether weights may change in place, so that keys have to be this engine's own."""
    if wanted != "auto":
        return wanted == "yes"
    changes = getattr(vllm_config, "weight_transfer_config", None) is not None
    return changes or bool(getattr(vllm_config.model_config, "enable_sleep_mode", False))
