"""`VCacheL2Adapter`: the pool under `lmcache server`, LMCache's multiprocess mode.

Its objects lie in the server's own memory, so a store and a load are one copy each; what is locked is pinned.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface

try:
    from lmcache.lmcache_native import Bitmap
except ImportError:  # before 0.5
    from lmcache.native_storage_ops import Bitmap

from integration.lmcache.core import Core
from integration.lmcache.logs import log_with_lmcache
from integration.lmcache.memory import bytes_of_view, form_of_view
from integration.lmcache.misses import Failures
from vcache.engine.chunks import Part
from vcache.keys import KeyChain, join_fields
from vcache.layout import KVLayout
from vcache.logs import Line

_LAYOUT = KVLayout(
    num_layers=1,
    num_kv_heads=1,
    head_size=1,
    dtype="uint8",
    chunk_tokens=1,
    kv_parts=1,
    form="pages",
    page_tokens=1,
    page_bytes=1,
    page_format="lmcache.mp.1, chunks of any size that say themselves what they hold",
)

Result = TypeVar("Result")

_log = logging.getLogger("vcache.integration.lmcache")


class _Tasks:
    """Results by task, and the event that says that there is one."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._guard = threading.Lock()
        self._done: dict[int, Any] = {}

    def finish(self, task: int, result: Any) -> None:
        with self._guard:
            if self.fd >= 0:
                self._done[task] = result
                os.eventfd_write(self.fd, 1)

    def take(self, task: int) -> Any:
        with self._guard:
            return self._done.pop(task, None)

    def take_all(self) -> dict[int, Any]:
        with self._guard:
            done, self._done = self._done, {}
            return done

    def close(self) -> None:
        with self._guard:
            fd, self.fd = self.fd, -1
            if fd >= 0:
                os.close(fd)


class VCacheL2Adapter(L2AdapterInterface):
    """LMCache's L2 adapter over the pool. Thread-safe; only the constructor raises.

    params: `vcache.…` settings as in `extra_config` of the plugin, and `model`, the name under which
    `vcache clear` knows these chunks. The pool makes room by itself: LMCache is told of no usage.
    """

    def __init__(self, params: dict[str, Any], l1_memory_desc: Any = None) -> None:
        super().__init__()
        log_with_lmcache()
        given = dict(params or {})
        model = str(given.pop("model", "lmcache-mp"))
        self._core = Core(given, layout=_LAYOUT, model=model, name=f"lmcache-mp {model}"[:200])
        self._chain = KeyChain(_LAYOUT.fingerprint, model)
        self._guard = threading.Lock()
        self._last = 0
        self._failures = Failures()
        self._stores, self._lookups, self._loads = _Tasks(), _Tasks(), _Tasks()
        _log.info(Line("LMCache's server uses VCache", model=model))

    # -- events

    def get_store_event_fd(self) -> int:
        """Readable when a store is done."""
        return self._stores.fd

    def get_lookup_and_lock_event_fd(self) -> int:
        """Readable when a lookup is done."""
        return self._lookups.fd

    def get_load_event_fd(self) -> int:
        """Readable when a load is done."""
        return self._loads.fd

    # -- storing

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Store copies; one that finds no room fails the task, and the others are stored."""
        return self._begin(
            self._stores, "store", lambda: self._store(keys, objects), lambda: L2StoreResult(False, 0)
        )

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        """What became of the stores that are done."""
        return self._stores.take_all()

    def _store(self, keys: Sequence[Any], views: Sequence[Any]) -> Any:
        chunks = self._core.chunks
        bound = self._bound(keys)
        there = chunks.present(bound)
        stored, parts = [], []
        complete = True
        try:
            for key, chunk, view, present in zip(keys, bound, views, there, strict=True):
                if present:
                    continue
                drafts = chunks.draft(form_of_view(view), 1)
                if not drafts:
                    complete = False
                    continue
                parts.append(Part(drafts[0], 0, chunk))
                drafts[0].part(0).copy_(bytes_of_view(view))
                stored.append((key, view.get_size()))
            chunks.put(parts)
        finally:
            for part in parts:
                chunks.free(part.draft, 0)
        if parts and not all(chunks.present([part.key for part in parts])):
            complete = False
        if stored:
            self._notify_keys_stored([key for key, _ in stored], [0] * len(stored))
        return L2StoreResult(complete, sum(size for _, size in stored))

    # -- looking

    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: Any = None) -> int:
        """Look, and pin what is there until it is unlocked."""
        return self._begin(self._lookups, "lookup", lambda: self._lock(keys), lambda: Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        """Which keys are there; None if that is not known yet, or was asked before."""
        return self._lookups.take(task_id)

    def submit_unlock(self, keys: list[Any]) -> None:
        """End one pin of each."""
        for chunk in self._bound(keys):
            hold = self._core.pins.take(chunk)
            if hold is not None:
                self._core.chunks.drop(hold)

    def _lock(self, keys: Sequence[Any]) -> Any:
        holds = self._core.chunks.take(self._bound(keys))
        self._core.pins.add(hold for hold in holds if hold is not None)
        return _bitmap(hold is not None for hold in holds)

    # -- loading

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Copy what is there into the objects."""
        return self._begin(self._loads, "load", lambda: self._load(keys, objects), lambda: Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Any:
        """Which objects were filled; None if that is not known yet, or was asked before."""
        return self._loads.take(task_id)

    def _load(self, keys: Sequence[Any], views: Sequence[Any]) -> Any:
        chunks = self._core.chunks
        holds = chunks.take(self._bound(keys))
        try:
            forms = iter(chunks.forms([hold for hold in holds if hold is not None]))
            filled, loaded = [], []
            for key, hold, view in zip(keys, holds, views, strict=True):
                form = None if hold is None else next(forms)
                target = bytes_of_view(view)
                fits = form is not None and form.parts == 1 and form.part_bytes == target.numel()
                if fits and hold is not None and form is not None:
                    target.copy_(form.part(hold.chunk, 0))
                    loaded.append(key)
                filled.append(fits)
        finally:
            chunks.drop_all(holds)
        if loaded:
            self._notify_keys_accessed(loaded)
        return _bitmap(filled)

    # -- the rest

    def delete(self, keys: list[Any]) -> None:
        """Forget chunks."""
        try:
            self._core.chunks.remove(self._bound(keys))
            self._notify_keys_deleted(keys, [0] * len(keys))
        except Exception as error:
            self._failures.note("delete", error)

    def report_status(self) -> dict[str, Any]:
        """Whether the metadata server answers, and our figures."""
        return {
            "is_healthy": not self._core.closed and self._core.client.connected,
            "type": type(self).__name__,
            "failures": self._failures.count,
            **self._core.stats(),
        }

    def close(self) -> None:
        """End, and leave the pool."""
        self._core.close()
        for tasks in (self._stores, self._lookups, self._loads):
            tasks.close()

    def _begin(
        self, tasks: _Tasks, name: str, work: Callable[[], Result], refused: Callable[[], Result]
    ) -> int:
        """Do it in a thread of ours; while too much is under way it fails at once. It always ends."""
        with self._guard:
            self._last += 1
            task = self._last

        def run() -> None:
            try:
                result = work()
            except Exception as error:  # LMCache waits for an answer, whatever happens
                self._failures.note(name, error)
                result = refused()
            tasks.finish(task, result)

        if self._core.reads.submit(run) is None:
            tasks.finish(task, refused())
        return task

    def _bound(self, keys: Sequence[Any]) -> list[bytes]:
        return [
            self._chain.bind(
                join_fields(
                    [
                        b"object",
                        key.chunk_hash,
                        key.model_name.encode(),
                        str(key.kv_rank).encode(),
                        str(getattr(key, "object_group_id", 0)).encode(),
                        str(getattr(key, "cache_salt", "")).encode(),
                    ]
                )
            )
            for key in keys
        ]


def _bitmap(flags: Any) -> Any:
    listed = list(flags)
    bitmap = Bitmap(len(listed))
    for at, flag in enumerate(listed):
        if flag:
            bitmap.set(at)
    return bitmap
