"""Which way GPU memory is exported: the better one of those that a second process really could use."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from vcache.errors import SegmentError
from vcache.limits import CUDA_PROBE_BYTES
from vcache.segment.base import Segment
from vcache.segment.cuda_errors import Way
from vcache.segment.probe import Probed, probe

_log = logging.getLogger(__name__)

PREFERRED: Final = (Way.FD, Way.IPC)
"""The better one first: a descriptor crosses PID namespaces, may be mapped read-only, and its memory may be
let go of in any order.
"""


class _Allocate(Protocol):
    def __call__(self, ordinal: int, size: int, *, way: Way) -> Segment:
        """A segment on a GPU, exported in this way."""


_guard = threading.Lock()
_best: dict[int, Way] = {}


def best_way(ordinal: int, label: str, allocate: _Allocate) -> Way:
    """The way for GPU `ordinal`, probed once for each GPU and process, and logged.

    Raises SegmentError if none works, with each one's reason.

    label: "cuda:GPU-…". allocate: makes the segment that is probed.
    """

    def try_out(way: Way) -> Probed:
        # The second process sees that GPU alone: numbers may mean other GPUs to it than here.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": label.partition(":")[2]}
        with allocate(ordinal, CUDA_PROBE_BYTES, way=way) as segment:
            return probe(segment, own_device="cuda:0", environment=environment)

    with _guard:
        if ordinal not in _best:
            _best[ordinal] = first_that_works(label, PREFERRED, try_out)
        return _best[ordinal]


def first_that_works(label: str, ways: Sequence[Way], try_out: Callable[[Way], Probed]) -> Way:
    """The first of `ways` that `try_out` does not raise SegmentError for; logged, with what was wrong with
    those before it. Raises SegmentError if there is none.
    """
    failed: list[str] = []
    for way in ways:
        try:
            probed = try_out(way)
        except SegmentError as error:
            failed.append(f"by {way.title}: {error}")
            continue
        peers = "writable only" if probed.writable else "read-only where they only read"
        said = f"{label}: segments are shared by {way.title}; peers can map them {peers}"
        if failed:
            _log.warning("%s (not %s)", said, "; nor ".join(failed))
        else:
            _log.info("%s", said)
        return way
    raise SegmentError(
        f"memory of {label} cannot be shared with other processes: {'; '.join(failed)}; until that is "
        "mended, segments on shm work (device: shm:0)"
    )
