"""The segment that an engine's process lends to the pool."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable
from contextlib import ExitStack

import msgspec

from vcache.client import Client
from vcache.config import Config
from vcache.engine.moving import SegmentMover
from vcache.limits import SEGMENT_ALIGN_BYTES
from vcache.logs import Line
from vcache.room import default_segment_bytes, memory_room
from vcache.segment import Segment, allocate, parse_device

_log = logging.getLogger(__name__)


class Lending:
    """Allocates segments as configured; `source` is what the client calls for one, None if nothing is lent.

    A size that the user gave is allocated at once, so that one that does not fit raises SegmentError here;
    "auto" is allocated when the client asks, and where it fails the process lends nothing.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._device = config.device
        self._numa = config.segment.numa
        self._first: Segment | None = None
        self.source: Callable[[], Segment] | None = None
        if config.segment.size == 0:
            return
        if config.segment.size == "auto" and parse_device(self._device)[0] != "shm":
            # Memory that an engine took on a GPU behind vLLM's back would be missing where vLLM measured it.
            _log.info(
                Line("lends nothing: on a GPU holders do, or segment.size says how much", device=self._device)
            )
            return
        self.source = self._next
        if config.segment.size != "auto":
            self._first = self._allocate()

    def client(self, name: str, device: str | None = None) -> Client:
        """A session that lends the segment, and makes the copies to and from it that the server wants.

        device: that peers' segments are mapped for; None: the one that the segment is on.
        """
        config = msgspec.structs.replace(self._config, device=device or self._config.device)
        client = Client(config, name=name, new_segment=self.source, rank=config.segment.rank)
        with ExitStack() as undo:
            undo.callback(client.close)
            if self.source is not None:
                SegmentMover(client, self._device)
            undo.pop_all()
        return client

    def close(self) -> None:
        """Free what the client did not ask for."""
        first, self._first = self._first, None
        if first is not None:
            first.close()

    def _next(self) -> Segment:
        first, self._first = self._first, None
        return first or self._allocate()

    def _allocate(self) -> Segment:
        wanted = self._config.segment.size
        size = default_segment_bytes(memory_room(self._numa)) if wanted == "auto" else wanted
        align = mmap.PAGESIZE if parse_device(self._device)[0] == "shm" else SEGMENT_ALIGN_BYTES
        return allocate(self._device, max(size // align, 1) * align, numa=self._numa)
