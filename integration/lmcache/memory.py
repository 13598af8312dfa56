"""LMCache's view of a chunk: its `MemoryObj`, over memory of the pool."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import torch
from lmcache.v1.memory_management import (
    MemoryAllocatorInterface,
    MemoryFormat,
    MemoryObjMetadata,
    TensorMemoryObj,
)

from vcache.engine.forms import Form, dtype_of
from vcache.logs import Line

_log = logging.getLogger("vcache.integration.lmcache")

_NOTHING = torch.empty(0, dtype=torch.uint8)


class PoolView(TensorMemoryObj):
    """One part of a chunk, to be written or to be read, with a reference count of its own.

    `ended` is called once, when both counts (references, pins) have come to zero, in whichever thread that
    happens. References that are given back more often than taken are passed over: LMCache does that.
    """

    def __init__(
        self,
        raw: torch.Tensor,
        form: Form,
        parent: MemoryAllocatorInterface,
        ended: Callable[[], None],
        draft: Any = None,
        part: int = 0,
    ) -> None:
        shapes = [torch.Size(shape) for shape in form.shapes]
        dtypes = [dtype_of(name) for name in form.dtypes]
        metadata = MemoryObjMetadata(
            shapes[0],
            dtypes[0],
            raw.data_ptr(),
            raw.numel(),
            1,
            0,
            MemoryFormat(form.kind),
            shapes=shapes,
            dtypes=dtypes,
        )
        super().__init__(raw, metadata, parent)
        self.lock = threading.RLock()  # LMCache's own `unpin` takes it, too
        self.draft = draft
        self.part = part
        self._ended: Callable[[], None] | None = ended

    def ref_count_down(self) -> None:
        """Give one reference back; surplus ones do nothing."""
        with self.lock:
            if self.meta.ref_count > 0:
                self.meta.ref_count -= 1
                self._end_if_unused()

    def unpin(self) -> bool:
        """Give one pin back; surplus ones do nothing."""
        with self.lock:
            if self.meta.pin_count > 0:
                # The last one is LMCache's to do, for it counts pinned memory; what it frees is freed here.
                super().unpin()
            return True

    def end(self) -> None:
        """Free it, whatever the counts say: for the allocator, which is asked by whoever collects garbage."""
        with self.lock:
            ended, self._ended = self._ended, None
            if ended is None:
                return
            self.invalidate()
            self.raw_data = _NOTHING
        ended()

    def __del__(self) -> None:
        # A finaliser runs wherever memory is being allocated, perhaps under the very lock that `ended` takes.
        ended = getattr(self, "_ended", None)
        if ended is not None:
            self._ended = None
            self.parent_allocator.abandoned.put(ended)

    def _end_if_unused(self) -> None:
        if self.meta.ref_count == 0 and self.meta.pin_count == 0:
            self.end()


class PoolMemory(MemoryAllocatorInterface):
    """What LMCache knows as the allocator of `PoolView`s.

    allocate_views: called for `allocate` and `batched_allocate`: (form, count) → views, or None.
    abandoned: ends of views that became garbage without having been given back; `sweep` calls them.
    """

    def __init__(self, allocate_views: Callable[[Form, int], list[PoolView] | None]) -> None:
        self._allocate_views = allocate_views
        self.abandoned: SimpleQueue[Callable[[], None]] = SimpleQueue()  # its `put` may interrupt itself

    def sweep(self) -> None:
        """End what was abandoned; in a thread that holds no lock."""
        while True:
            try:
                ended = self.abandoned.get_nowait()
            except Empty:
                return
            _log.warning(Line("LMCache dropped memory without giving it back"))
            ended()

    def allocate(
        self,
        shapes: Any,
        dtypes: Any,
        fmt: MemoryFormat = MemoryFormat.UNDEFINED,
        allocator_type: str | None = None,
    ) -> PoolView | None:
        """Memory for one tensor, or one group of tensors; None if the pool has no room."""
        views = self._allocate_views(form_of(shapes, dtypes, fmt), 1)
        return views[0] if views else None

    def batched_allocate(
        self,
        shapes: Any,
        dtypes: Any,
        batch_size: int,
        fmt: MemoryFormat = MemoryFormat.UNDEFINED,
        allocator_type: str | None = None,
    ) -> list[PoolView] | None:
        """All `batch_size`, or None."""
        return self._allocate_views(form_of(shapes, dtypes, fmt), batch_size)

    def free(self, memory_obj: Any, allocator_type: str | None = None) -> None:
        """Called by a view whose counts came to zero, or that is garbage; again is harmless."""
        if isinstance(memory_obj, PoolView):
            memory_obj.end()

    def batched_free(
        self, memory_objs: Sequence[Any], allocator_type: str | None = None, update_stats: bool = True
    ) -> None:
        """As `free`, for each."""
        for view in memory_objs:
            self.free(view)

    def memcheck(self) -> bool:
        """Whether our books add up. The server proves its own: `vcache` has `check` for that."""
        return True


def form_of(shapes: Any, dtypes: Any, fmt: MemoryFormat) -> Form:
    """The form of one part as LMCache names it: one shape and dtype, or a list of each."""
    if isinstance(shapes, torch.Size):
        shapes = [shapes]
    elif shapes and isinstance(shapes[0], int):
        shapes = [torch.Size(shapes)]
    if isinstance(dtypes, torch.dtype):
        dtypes = [dtypes]
    return Form(
        tuple(tuple(int(size) for size in shape) for shape in shapes),
        tuple(str(dtype).removeprefix("torch.") for dtype in dtypes),
        fmt.value,
    )


def form_of_view(memory: Any) -> Form:
    """The form of a MemoryObj of whatever kind."""
    meta = memory.metadata
    if meta.shapes and meta.dtypes:
        return form_of(meta.shapes, meta.dtypes, meta.fmt)
    if meta.dtype is None:  # compressed bytes
        return Form(((memory.get_size(),),), ("uint8",), meta.fmt.value)
    return form_of(meta.shape, meta.dtype, meta.fmt)


def bytes_of_view(memory: Any) -> torch.Tensor:
    """The bytes of a MemoryObj of whatever kind (uint8, 1-D)."""
    raw = memory.raw_tensor
    if raw is None:
        return torch.frombuffer(bytearray(memory.byte_array), dtype=torch.uint8)
    flat: torch.Tensor = raw.reshape(-1).view(torch.uint8)
    return flat[: memory.get_size()]
