"""The pool as the engine sees it: whatever goes wrong there is a miss, counted and logged."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

from torch import Tensor

from vcache.client import Client, Grant, Reservation
from vcache.engine.stats import Cause, Counters
from vcache.errors import RemoteProtocolError, SegmentError, ServerError, Unavailable
from vcache.keys import namespace
from vcache.layout import KVLayout
from vcache.limits import HOLDER_SEARCH_INTERVAL_S, LABEL_BYTES_MAX, SAVE_LOOK_S, SAVE_WAIT_S
from vcache.protocol import Extents, SegmentRow
from vcache.segment import SegmentMemory, device_label
from vcache.segment.pinning import Registrar

Answer = TypeVar("Answer")


class Pool:
    """One layout's and model's chunks in the pool. Thread-safe; raises only EngineClosed, ForkedProcess."""

    def __init__(
        self,
        client: Client,
        counters: Counters,
        layout: KVLayout,
        model: str,
        device: str,
        registrar: Registrar | None = None,
    ) -> None:
        """registrar: host memory is within reach only when it is registered with this."""
        self._client = client
        self._counters = counters
        self._layout = layout
        self._fingerprint = layout.fingerprint
        self._model = model
        self._namespace = namespace(model)
        self._device = device
        self._registrar = registrar
        self._label = ""
        self._holder = 0
        self._holder_known_until_s = 0.0
        self._described_to = 0
        self._never = threading.Event()

    def connected(self) -> bool:
        """Whether requests go through now; counted if not."""
        connected = self._client.connected
        if not connected:
            self._counters.failed(Cause.NO_SERVER, "there is no connection to the metadata server")
        return connected

    # -- reading

    def lookup(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are there."""
        return self._ask(lambda: self._client.lookup(keys, self._fingerprint), 0)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Of each key, whether it is there."""
        return self._ask(lambda: self._client.contains(keys), [False] * len(keys))

    def acquire(self, keys: Sequence[bytes], *, pin: bool = False, prefix: bool = True) -> Grant | None:
        """The right to read the leading keys that are there, or all that are; None if not to be had."""
        near = self._near()
        ask = self._client.acquire
        return self._ask(lambda: ask(keys, layout=self._fingerprint, pin=pin, prefix=prefix, near=near), None)

    def intact(self, grant: Grant, begin: int, end: int) -> bool:
        """The fence: whether what was read of these chunks of a grant is what was committed.

        Ask when the copy has really finished, with what was read and no more: other chunks may be out of
        reach.
        """
        is_part = begin > 0 or end < len(grant.extents)
        if self._client.intact(replace(grant, extents=grant.extents[begin:end]) if is_part else grant):
            return True
        self._counters.failed(
            Cause.FENCE_BROKEN, "chunks were evicted while they were read", chunks=end - begin
        )
        return False

    def release(self, grant: Grant, part: Extents | None = None) -> None:
        """Nothing reads what was granted (or that part of it) any more."""
        self._client.release(grant, part)

    # -- writing

    def reserve(self, keys: Sequence[bytes]) -> Reservation | None:
        """The right to write those of `keys` that are not there, as far as they fit; None if refused.

        Waits up to SAVE_WAIT_S for chunks that are being copied before they are evicted for these.
        """

        def ask(patient: bool) -> Reservation:
            near, size = self._near(), self._layout.chunk_bytes
            return self._client.reserve(keys, layout=self._fingerprint, size=size, near=near, patient=patient)

        reservation = self._patiently(ask)
        if reservation is not None and len(reservation.extents) < reservation.wanted:
            got = len(reservation.extents)
            self._counters.failed(
                Cause.FULL_POOL, "no room for all chunks", wanted=reservation.wanted, got=got
            )
        return reservation

    def reserve_blank(self, count: int, size: int, spare: int = 0) -> Reservation | None:
        """The right to write `count` extents of `size` bytes whose keys come later, and of `spare` more that
        nobody waits for, as far as they fit; None if refused. Waits as `reserve`.
        """

        def ask(patient: bool, more: int = 0) -> Reservation:
            near, wanted = self._near(), count + more
            return self._client.reserve_blank(
                wanted, layout=self._fingerprint, size=size, near=near, patient=patient
            )

        reservation = self._ask(partial(ask, True, spare), None) if spare else None
        if reservation is None or reservation.coming:
            reservation = self._patiently(ask)
        if reservation is not None and not len(reservation.extents):
            self._counters.failed(Cause.FULL_POOL, "no room for a chunk", chunk_bytes=size)
        return reservation

    def _patiently(self, ask: Callable[[bool], Reservation]) -> Reservation | None:
        """What is granted by SAVE_WAIT_S, or then at the cost of what is not copied yet. ask: patiently?"""
        reservation = self._ask(partial(ask, True), None)
        deadline_s = time.monotonic() + SAVE_WAIT_S
        while reservation is not None and reservation.coming:
            is_late = time.monotonic() > deadline_s
            if not is_late:
                self._never.wait(SAVE_LOOK_S)
            reservation = self._ask(partial(ask, not is_late), None)
        return reservation

    def commit(
        self,
        extents: Extents,
        keys: Sequence[bytes],
        sizes: Sequence[int],
        lineage: int,
        *,
        ttl_ms: int = -1,
        keep_lost: bool = False,
    ) -> bytes:
        """Make written extents visible; an `Outcome` for each, none if that failed. They are ours no more.

        ttl_ms: -1: as the server is configured. keep_lost: those whose key somebody else's copy has taken
        stay ours, to be written anew.
        """
        commit = partial(self._client.commit, namespace=self._namespace, ttl_ms=ttl_ms, keep_lost=keep_lost)
        outcomes = self._ask(lambda: commit(extents, keys, sizes), b"")
        epoch = self._client.epoch
        if outcomes and epoch and self._described_to != epoch:  # a restarted server has forgotten the names
            self._described_to = epoch
            for digest, label in (
                (self._fingerprint, self._layout.describe()),
                (self._namespace, self._model),
            ):
                self._ask(partial(self._client.describe, digest, _cut(label)), None)
        return outcomes

    def abort(self, extents: Extents) -> None:
        """Give reserved extents back; nothing here touches them any more."""
        if len(extents):
            self._client.abort(extents)

    # -- forgetting

    def remove(self, keys: Sequence[bytes]) -> int:
        """Forget chunks; how many were there."""
        return self._ask(lambda: self._client.remove(keys), 0)

    def clear(self) -> int:
        """Forget all chunks of this model; how many there were."""
        return self._ask(lambda: self._client.clear(self._namespace), 0)

    # -- memory

    def capacity_bytes(self) -> int:
        """Bytes of all segments that have a holder now; 0 if that is not to be had."""
        stats = self._ask(self._client.stats, None)
        return 0 if stats is None else sum(row.size for row in stats.segments if row.held)

    @contextmanager
    def borrowed(
        self, extents: Extents, sizes: Sequence[int], lineage: int, kind: str | None = None
    ) -> Iterator[list[Tensor | None]]:
        """The first `sizes[i]` bytes of each extent, uint8, while the block runs; None where out of reach.

        kind: of the device that is to reach it ("cpu", "cuda"); None for any. Take no view out of the block:
        its memory may be unmapped then.
        """
        views: list[Tensor | None] = []
        with ExitStack() as borrows:
            numbers = extents["segment"].tolist()
            places = list(zip(extents["offset"].tolist(), sizes, strict=True))
            found = {
                number: self._views(self._segment(number, lineage, borrows), theirs, kind)
                for number, theirs in _grouped(numbers, places).items()
            }
            if len(found) == 1:
                views += found.popitem()[1]
            else:
                following = {number: iter(theirs) for number, theirs in found.items()}
                views += [next(following[number]) for number in numbers]
                del following  # which holds the views, too
            del found
            try:
                yield views
            finally:
                views.clear()

    def _segment(self, number: int, lineage: int, borrows: ExitStack) -> SegmentMemory | None:
        segment = self._ask(lambda: self._client.segment(number, lineage), None)
        borrow = None if segment is None else segment.borrow()
        if segment is None or borrow is None:
            self._counters.failed(Cause.DEAD_HOLDER, "a segment is out of reach", segment=number)
            return None
        borrows.enter_context(borrow)
        if self._registrar is not None:
            try:
                segment.register(self._registrar)
            except SegmentError as error:
                self._counters.failed(Cause.OTHER_MEMORY, error, segment=number)
                return None
        return segment

    def _views(
        self, segment: SegmentMemory | None, places: Sequence[tuple[int, int]], kind: str | None
    ) -> Sequence[Tensor | None]:
        if segment is None:
            return [None] * len(places)
        with suppress(RemoteProtocolError, SegmentError):
            views = segment.views(places)
            if kind in (None, views[0].device.type):
                return views
        # One by one, so that an impossible one costs one.
        return [self._view(segment, offset, size, kind) for offset, size in places]

    def _view(self, segment: SegmentMemory, offset: int, size: int, kind: str | None) -> Tensor | None:
        try:
            view = segment.view(offset, size)
            if kind in (None, view.device.type):
                return view
            self._counters.failed(
                Cause.OTHER_MEMORY, "a segment is of memory that copies cannot reach", got=segment.device
            )
        except RemoteProtocolError as error:
            self._counters.failed(Cause.MALFORMED, error)
        except SegmentError as error:
            self._counters.failed(Cause.DEAD_HOLDER, error)
        return None

    # -- asking

    def _ask(self, request: Callable[[], Answer], otherwise: Answer) -> Answer:
        try:
            return request()
        except Unavailable as error:
            self._counters.failed(Cause.NO_SERVER, error)
        except ServerError as error:
            self._counters.failed(Cause.REFUSED, error)
        except RemoteProtocolError as error:
            self._counters.failed(Cause.MALFORMED, error)
        return otherwise

    def _near(self) -> int:
        """The segment to prefer: our own, or one that a holder lends on our device; 0 if there is none."""
        own = self._client.own_segment
        now = time.monotonic()
        if own or now < self._holder_known_until_s:
            return own or self._holder
        self._holder_known_until_s = now + HOLDER_SEARCH_INTERVAL_S
        label = self._known_label()
        stats = self._ask(self._client.stats, None) if label else None
        self._holder = 0 if stats is None else _roomiest(stats.segments, label)
        return self._holder

    def _known_label(self) -> str:
        """What other processes call our device; empty while that cannot be found out."""
        if not self._label:
            try:
                self._label = device_label(self._device)
            except SegmentError as error:
                self._counters.failed(Cause.DEAD_HOLDER, error)
        return self._label


def _grouped(
    numbers: Sequence[int], places: Sequence[tuple[int, int]]
) -> dict[int, Sequence[tuple[int, int]]]:
    """The places by number, in their order."""
    if len(distinct := set(numbers)) == 1:
        return {distinct.pop(): places}
    return {
        each: [place for at, place in zip(numbers, places, strict=True) if at == each] for each in distinct
    }


def _cut(label: str) -> str:
    return label.encode()[:LABEL_BYTES_MAX].decode(errors="ignore")


def _roomiest(rows: Sequence[SegmentRow], label: str) -> int:
    ours = [row for row in rows if row.device == label and row.held]
    return max(ours, key=lambda row: row.free_bytes).segment if ours else 0
