"""Hold a segment and lend it to the pool until SIGTERM or Ctrl-C.

The pool outlives the engines then: one that crashes or is upgraded finds its cache warm. The holder waits for
a server, comes back to one that was restarted, and takes new memory where that one has lost its table.
"""

from __future__ import annotations

import argparse
import logging
import mmap
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from vcache.cli import present
from vcache.cli.exits import Exit
from vcache.cli.invocation import Invocation
from vcache.client import Client
from vcache.config import Config, parse_size
from vcache.engine.moving import SegmentMover
from vcache.errors import ArgumentError, ServerError
from vcache.limits import SEGMENT_ALIGN_BYTES, SEGMENT_BYTES_MIN
from vcache.logs import Line
from vcache.protocol import ErrorCode
from vcache.room import default_segment_bytes, memory_room
from vcache.segment import Segment, allocate, parse_device

_log = logging.getLogger(__name__)

_LOOK_S = 0.5
"""How often it looks whether it was told to end while it waits for the segment to be lent."""

_REFUSED_LOOKS = 2
"""Looks in a row that find a session without the segment before that counts as refused: a session that begins
anew has none for an instant.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vcache segment`."""
    parser.add_argument("--device", help="shm:N or cuda:N (default: `device` of the configuration)")
    parser.add_argument(
        "--size", help="2GiB, 512MiB, … or auto (default: `segment.size` of the configuration)"
    )
    parser.add_argument("--numa", type=int, metavar="N", help="NUMA node of shared memory")
    parser.add_argument(
        "--rank",
        type=int,
        help="0: where chunks are stored; 1: under that (default: `segment.rank` of the configuration)",
    )


def run(invocation: Invocation) -> int:
    """Allocate, lend, say so on one line of standard output, and hold until told to end."""
    options, config = invocation.options, invocation.config
    rank = config.segment.rank if options.rank is None else options.rank
    if not 0 <= rank <= 1:
        raise ArgumentError("--rank", rank, "0 or 1")
    if options.device is not None:
        config = msgspec.structs.replace(config, device=options.device)
    holder = _Holder(config, _size(config, options.size), _numa(config, options.numa))
    holder.allocate_first()
    try:
        with _until_told(holder):
            return holder.hold(rank, as_json=invocation.as_json)
    finally:
        holder.close()


class _Holder:
    """The segment's source, and the thread that waits: for memory that was allocated and for the end."""

    def __init__(self, config: Config, size: int, numa: int | None) -> None:
        self._config = config
        self._size = size
        self._numa = numa
        self._first: Segment | None = None
        self._allocated: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._told = threading.Event()

    def allocate_first(self) -> None:
        """Before anybody is asked for anything, so that what does not fit is an error here and now.

        Says what takes so long: shared memory is written to once, page by page, before it is lent.
        """
        device, size = self._config.device, present.size(self._size)
        console = present.console(errors=True)
        what = "allocating and populating" if device.startswith("shm") else "allocating"
        if console.is_terminal:
            with console.status(f"{what} {size} on {device} (some seconds for every 10 GiB) …"):
                self._first = self._allocate()
        else:
            _log.info(Line(what, device=device, size=size))
            self._first = self._allocate()

    def end(self) -> None:
        """Have `hold` return; safe in a signal handler."""
        self._told.set()
        self._allocated.put(None)

    def close(self) -> None:
        """Free what nobody came for."""
        first, self._first = self._first, None
        if first is not None:
            first.close()

    def hold(self, rank: int, *, as_json: bool) -> int:
        """Lend until told to end. A pool that has lost its table gets new memory, which is said again."""
        client = Client(self._config, name=f"holder {self._config.device}", new_segment=self._next, rank=rank)
        SegmentMover(client, self._config.device)
        try:
            while True:
                self._allocated.get()
                number = self._wait_lent(client)
                if self._told.is_set():
                    return Exit.OK
                try:
                    self._say(number, as_json=as_json)
                except BrokenPipeError:  # whoever started us reads no more: the pool still needs us
                    _log.info(Line("nobody reads our output any more", segment=number))
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        finally:
            client.close()

    def _next(self) -> Segment:
        """Called by the client: at first, and after the server has lost its table."""
        first, self._first = self._first, None
        segment = first or self._allocate()
        self._allocated.put(None)
        return segment

    def _allocate(self) -> Segment:
        return allocate(self._config.device, self._size, numa=self._numa)

    def _wait_lent(self, client: Client) -> int:
        """The number under which it is lent; 0 when told to end. Raises ServerError if it is refused."""
        refused = 0
        while not self._told.is_set():
            settled = client.wait_connected(_LOOK_S)
            if client.own_segment:
                return client.own_segment
            refused = refused + 1 if settled else 0
            if refused >= _REFUSED_LOOKS:
                raise ServerError(
                    ErrorCode.LIMIT, "the metadata server does not take the segment: see the log"
                )
            if settled:
                self._told.wait(_LOOK_S)
        return 0

    def _say(self, number: int, *, as_json: bool) -> None:
        size, device, pid = self._size, self._config.device, os.getpid()
        if as_json:
            present.write_json({"segment": number, "device": device, "size": size, "pid": pid})
            return
        print(
            f"ready: segment {number}, {present.size(size)} on {device}, is lent by process {pid}", flush=True
        )


@contextmanager
def _until_told(holder: _Holder) -> Iterator[None]:
    """SIGTERM and SIGINT end the holder in order: importers let go first."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: holder.end()) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)


def _size(config: Config, given: str | None) -> int:
    """Bytes to allocate, whole pages. Raises ArgumentError naming what is wanted."""
    kind, _ = parse_device(config.device)
    align = mmap.PAGESIZE if kind == "shm" else SEGMENT_ALIGN_BYTES
    size = config.segment.size if given is None else given
    if size == "auto":
        if kind != "shm":
            raise ArgumentError(
                "--size", "auto", f"a size such as 16GiB: what {config.device} has is the engine's"
            )
        return default_segment_bytes(memory_room(config.segment.numa))
    count = parse_size(size)
    if count < SEGMENT_BYTES_MIN:
        why = " (segment.size of the configuration is 0)" if given is None else ""
        raise ArgumentError("--size", count, f"a size such as 2GiB, at least 8KiB{why}")
    return max(count // align, 1) * align


def _numa(config: Config, given: int | None) -> int | None:
    return config.segment.numa if given is None else given
