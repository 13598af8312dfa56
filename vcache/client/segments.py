"""Segment numbers and the memory behind them: peers' segments, mapped on first use, and our own."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from vcache.errors import RemoteProtocolError, SegmentError
from vcache.limits import SEGMENT_RETRY_S
from vcache.protocol import FromClient, Open, Opened, Unmapped
from vcache.segment import MappedSegment, Segment, decode_descriptor, map_segment

_log = logging.getLogger(__name__)

Memory = Segment | MappedSegment


class _State(Enum):
    ASKED = "asked"
    ANSWERED = "answered"
    MAPPING = "being mapped"
    MAPPED = "mapped"
    REFUSED = "refused"
    GONE = "gone"


@dataclass(eq=False)
class _Entry:
    state: _State
    opened: Opened | None = None
    fd: int | None = None
    memory: MappedSegment | None = None
    retry_at_s: float = 0.0


class _Lineage:
    """The segments of one lineage. Numbers of another one mean nothing here."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.ready: dict[int, Memory] = {}
        self.entries: dict[int, _Entry] = {}


class Segments:
    """Number → memory, for one session. Thread-safe.

    post: sends a message to the server of now; the session's thread tells what has arrived. answers: whether
    the server does; if not, no thread waits for it.
    """

    def __init__(
        self,
        post: Callable[[FromClient], bool],
        own_device: str,
        answers: Callable[[], bool],
    ) -> None:
        self._post = post
        self._answers = answers
        self._own_device = own_device if own_device.startswith("cuda") else None
        self._changed = threading.Condition()
        self._now = _Lineage(0)
        self._retiring = 0

    # -- for engine threads

    def get(self, number: int, lineage: int, timeout_s: float) -> Memory | None:
        """The memory of a segment, mapped if it was not yet; None if it cannot be had (now): a miss."""
        now = self._now
        if now.number != lineage:
            return None
        memory = now.ready.get(number)
        return memory if memory is not None else self._open(now, number, timeout_s)

    def intact(self, number: int, lineage: int) -> bool:
        """Whether the segment that is mapped under this number still is the incarnation that was mapped."""
        now = self._now
        memory = now.ready.get(number) if now.number == lineage else None
        return memory is not None and memory.incarnation_now() == memory.incarnation

    def _open(self, now: _Lineage, number: int, timeout_s: float) -> Memory | None:
        deadline = time.monotonic() + timeout_s
        mapping: _Entry | None = None
        try:
            with self._changed:
                entry = now.entries.get(number)
                if not self._answers() and (entry is None or entry.state in (_State.ASKED, _State.REFUSED)):
                    return None
                if entry is None or (entry.state is _State.REFUSED and time.monotonic() >= entry.retry_at_s):
                    entry = now.entries[number] = _Entry(_State.ASKED)
                    if self._now is not now or not self._post(Open(number, number)):
                        del now.entries[number]
                        return None
                if not self._is_answered(entry, deadline):
                    return now.ready.get(number)
                mapping = entry  # and only then its state: an interrupt may come at any time
                entry.state = _State.MAPPING
            return self._map(now, number, entry)
        except BaseException:
            if mapping is not None:
                self._not_mapped(now, number, mapping)
            raise

    def _is_answered(self, entry: _Entry, deadline: float) -> bool:
        """Wait until the server has opened a segment, or somebody has mapped it; whether it has to be mapped
        here. Under the lock.
        """
        waiting = (_State.ASKED, _State.MAPPING)
        if not self._changed.wait_for(
            lambda: entry.state not in waiting or (entry.state is _State.ASKED and not self._answers()),
            deadline - time.monotonic(),
        ):
            if entry.state is _State.ASKED:  # one wait is enough: it is a miss for a while
                self._refuse(entry)
            return False
        return entry.state is _State.ANSWERED

    def _not_mapped(self, now: _Lineage, number: int, entry: _Entry) -> None:
        """Whoever was mapping it was interrupted: the next one asks anew."""
        with self._changed:
            is_known = now.entries.get(number) is entry and entry.state is _State.MAPPING
            if is_known:
                del now.entries[number]
            self._changed.notify_all()
        if is_known:
            self._let_go(now, number)

    def _map(self, now: _Lineage, number: int, entry: _Entry) -> Memory | None:
        """Map what the server opened; by the thread that found it, outside the lock: it takes a while."""
        memory = self._try_map(number, entry)
        with self._changed:
            wanted = entry.state is _State.MAPPING and self._now is now
            if memory is not None and wanted:
                entry.state, entry.memory = _State.MAPPED, memory
                now.ready[number] = memory
            elif wanted:
                self._refuse(entry)
            self._changed.notify_all()
        if memory is None:
            self._let_go(now, number)
            return None
        if not wanted:  # it went while it was being mapped
            self._retire(now, number, memory)
            return None
        return memory

    def _try_map(self, number: int, entry: _Entry) -> MappedSegment | None:
        assert entry.opened is not None
        try:
            descriptor = decode_descriptor(entry.opened.descriptor)
            return map_segment(descriptor, entry.fd, own_device=self._own_device)
        except (SegmentError, RemoteProtocolError) as error:
            _log.warning("segment %d cannot be mapped: %s", number, error)
            return None
        except Exception:  # of a driver: a miss too, and nobody may wait for this thread for ever
            _log.exception("segment %d cannot be mapped", number)
            return None
        finally:
            _close(entry)

    # -- for the session's thread

    def enter(self, lineage: int) -> None:
        """A session that was not resumed begins: everything of before is void and unmapped when its copies
        are over.
        """
        with self._changed:
            old, self._now = self._now, _Lineage(lineage)
            for entry in old.entries.values():
                self._end(entry)
            old.ready.clear()
            self._changed.notify_all()
        for number, entry in old.entries.items():
            if entry.memory is not None:
                self._retire(old, number, entry.memory)

    def unanswered(self) -> None:
        """The server does not answer any more: nobody waits for it."""
        with self._changed:
            self._changed.notify_all()

    def interrupted(self) -> None:
        """The connection is lost: what was asked over it will not be answered. Mappings stay."""
        with self._changed:
            for number, entry in list(self._now.entries.items()):
                if entry.state in (_State.ASKED, _State.ANSWERED):
                    self._end(entry)
                    del self._now.entries[number]
            self._changed.notify_all()

    def opened(self, message: Opened, fd: int | None) -> None:
        """The server opened a segment for us."""
        with self._changed:
            entry = self._now.entries.get(message.segment)
            if entry is not None and entry.state is _State.ASKED:
                entry.state, entry.opened, entry.fd = _State.ANSWERED, message, fd
                self._changed.notify_all()
                return
            unused = entry is None or entry.state in (_State.GONE, _State.REFUSED)
        if fd is not None:
            os.close(fd)
        if unused:
            self._let_go(self._now, message.segment)

    def refused(self, number: int, why: str) -> None:
        """The server does not open a segment for us."""
        with self._changed:
            entry = self._now.entries.get(number)
            if entry is None or entry.state is not _State.ASKED:
                return
            self._refuse(entry)
        _log.info("segment %d is not to be had: %s", number, why)

    def gone(self, number: int) -> None:
        """The segment's incarnation has ended: unmap it when its copies are over, and say so."""
        now = self._now
        with self._changed:
            entry = now.entries.setdefault(number, _Entry(_State.GONE))
            before = entry.state
            self._end(entry)
            now.ready.pop(number, None)
            memory, entry.memory = entry.memory, None
            self._changed.notify_all()
        if memory is not None:
            self._retire(now, number, memory)
        elif before is not _State.MAPPING:  # whoever is mapping it says so
            self._let_go(now, number)

    def lend(self, number: int, own: Segment) -> None:
        """Our own segment is this number."""
        with self._changed:
            self._now.ready[number] = own

    def withdraw(self, number: int) -> None:
        """Our own segment is lent no more."""
        with self._changed:
            self._now.ready.pop(number, None)

    def retire_all(self) -> None:
        """Unmap every peer's segment when its copies are over."""
        with self._changed:
            numbers = [n for n, entry in self._now.entries.items() if entry.memory is not None]
        for number in numbers:
            self.gone(number)

    @property
    def retiring(self) -> int:
        """How many mappings wait for their copies to end."""
        return self._retiring

    def mapped(self) -> list[int]:
        """The numbers of peers' segments that are mapped."""
        with self._changed:
            return [n for n, entry in self._now.entries.items() if entry.state is _State.MAPPED]

    def _refuse(self, entry: _Entry) -> None:
        """To be called under the lock: it is not asked for again for a while."""
        entry.state, entry.retry_at_s = _State.REFUSED, time.monotonic() + SEGMENT_RETRY_S
        self._changed.notify_all()

    @staticmethod
    def _end(entry: _Entry) -> None:
        """To be called under the lock. Whoever is mapping it closes the descriptor himself."""
        if entry.state is not _State.MAPPING:
            _close(entry)
        entry.state = _State.GONE

    def _retire(self, lineage: _Lineage, number: int, memory: MappedSegment) -> None:
        with self._changed:
            self._retiring += 1

        def unmapped() -> None:
            with self._changed:
                self._retiring -= 1
            self._let_go(lineage, number)

        memory.retire(unmapped)

    def _let_go(self, lineage: _Lineage, number: int) -> None:
        """Tell the server that we do not map it, unless it is another server by now."""
        with self._changed:
            if self._now is lineage:
                self._post(Unmapped(number))


def _close(entry: _Entry) -> None:
    if entry.fd is not None:
        os.close(entry.fd)
        entry.fd = None
