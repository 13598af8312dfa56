"""Reading one chunk from its file in pieces, each verified while it is in the processor's cache.

Who wants the chunk takes them from the front. If a processor is idle a `Helper` takes them from the back
meanwhile, and none if it comes too late: nobody waits for more than the piece that it has begun.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from vcache.limits import (
    RECORD_HEADER_BYTES,
    RECORD_PIECE_BYTES,
    TIER_HELP_REST_CHUNKS,
    TIER_HELP_WAIT_PIECES,
)
from vcache.processors import idle_processors
from vcache.tiers.record import checksum_of_pieces, piece_checksum


def read_chunk(fd: int, into: memoryview, helper: Helper | None = None) -> int | None:
    """Fill `into` with the chunk of a record; its checksum, None if the file ends before it. Raises OSError.

    helper: may read along.
    """
    if helper is None or len(into) <= RECORD_PIECE_BYTES or not helper.is_free():
        checksums = []
        for at in range(0, len(into), RECORD_PIECE_BYTES):
            checksum = _read_piece(fd, into, at)
            if checksum is None:
                return None
            checksums.append(checksum)
        return checksum_of_pieces(checksums)
    pieces = Pieces(fd, into, helper.clock)
    try:
        helper.help_with(pieces)
        return pieces.read()
    finally:
        pieces.end()
        if pieces.held_up:
            helper.rest()


def _read_piece(fd: int, into: memoryview, begin: int) -> bytes | None:
    """Read the piece that begins there; its checksum, None if the file ends before it."""
    left = piece = into[begin : begin + RECORD_PIECE_BYTES]
    offset = RECORD_HEADER_BYTES + begin
    while left:
        count = os.preadv(fd, [left], offset)
        if not count:
            return None
        left, offset = left[count:], offset + count
    return piece_checksum(piece)


class Pieces:
    """A chunk that two threads read. `end` it, whatever happened.

    held_up: `read` has waited for the other one for longer than TIER_HELP_WAIT_PIECES take: that was no help.
    """

    def __init__(self, fd: int, into: memoryview, clock: Callable[[], float]) -> None:
        count = -(-len(into) // RECORD_PIECE_BYTES)
        self.held_up = False
        self._clock = clock
        self._fd = fd
        self._into = into[:]
        self._left = deque(range(count))
        self._checksums = [b""] * count
        self._helping = threading.Lock()

    def read(self) -> int | None:
        """Read all that nobody else has begun, and wait for that; the chunk's checksum, None if the file ends
        before it. Raises OSError.
        """
        began_s = self._clock()
        if not self._read_leading():
            return None
        read = len(self._checksums) - self._checksums.count(b"")
        ended_s = self._clock()
        with self._helping:  # what a helper could not read it has put back
            waited_s = self._clock() - ended_s
            self.held_up = waited_s * read > TIER_HELP_WAIT_PIECES * (ended_s - began_s)
            return checksum_of_pieces(self._checksums) if self._read_leading() else None

    def help(self, is_welcome: Callable[[], bool]) -> None:
        """Read some of them in another thread, one at a time while `is_welcome`. Never fails: what cannot be
        read is left to `read`.
        """
        with self._helping, suppress(IndexError):
            while is_welcome():
                number = self._left.pop()
                try:
                    is_there = self._read(number)
                except OSError:
                    is_there = False
                if not is_there:
                    self._left.append(number)
                    return

    def end(self) -> None:
        """Have nothing read any more, however late a helper comes: the memory is the caller's again."""
        self._left.clear()
        with self._helping:
            self._left.clear()
            self._into.release()

    def _read_leading(self) -> bool:
        with suppress(IndexError):
            while self._read(self._left.popleft()):
                continue
            return False
        return True

    def _read(self, number: int) -> bool:
        """Read one; whether it is there."""
        checksum = _read_piece(self._fd, self._into, number * RECORD_PIECE_BYTES)
        if checksum is None:
            return False
        self._checksums[number] = checksum
        return True


class Helper:
    """A thread that helps with one chunk at a time, while a processor is idle; started on first use.

    Where threads wait for processors, one that is stopped amid a piece holds up who reads for milliseconds.
    """

    def __init__(
        self, idle: Callable[[], int] = idle_processors, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock = clock
        self._idle = idle
        self._asked: queue.SimpleQueue[Pieces | None] = queue.SimpleQueue()
        self._is_busy = threading.Lock()
        self._resting_chunks = 0
        self._thread: threading.Thread | None = None

    def is_free(self) -> bool:
        """Whether it helps with a chunk now: if so, `help_with` it."""
        if self._resting_chunks > 0:
            self._resting_chunks -= 1
            return False
        return self._idle() > 0 and self._is_busy.acquire(blocking=False)

    def help_with(self, pieces: Pieces) -> None:
        """Help, in its thread; returns at once."""
        try:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="vcache-pieces", daemon=True)
                thread.start()
                self._thread = thread
            self._asked.put(pieces)
        except RuntimeError:  # there are no more threads, or the interpreter ends
            self._is_busy.release()

    def rest(self) -> None:
        """Leave the next chunks alone: others want the processors."""
        self._resting_chunks = TIER_HELP_REST_CHUNKS

    def close(self) -> None:
        """End the thread, now or after what it is reading; idempotent."""
        self._asked.put(None)

    def _run(self) -> None:
        while True:
            pieces = self._asked.get()
            if pieces is None:
                return
            try:
                pieces.help(lambda: self._idle() >= 0)
            finally:
                del pieces
                self._is_busy.release()
