"""From a lower tier into the pool: what was read is committed, what a tier still reads into stays lent."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import groupby
from types import TracebackType

import numpy as np
from torch import Tensor

from vcache.client import Reservation
from vcache.engine.lower import LowerTiers, Read, ttl_left_ms
from vcache.engine.passages import Passage
from vcache.engine.pool import Pool
from vcache.errors import LocalStateError
from vcache.protocol import Extents, Outcome
from vcache.tiers import Found


class Landing:
    """Reserved extents that chunks from the lower tiers are read into, within reach in the `with` block.

    At its end every extent that holds no promoted chunk goes back; one that a tier's call may still write to,
    whatever ended the block, as soon as that call has returned: until then it stays reserved and mapped.

    views: the first `sizes[i]` bytes of each extent; None where it is out of reach. Take none out of the
    block.
    """

    def __init__(
        self, pool: Pool, reservation: Reservation, sizes: Sequence[int], kind: str | None = None
    ) -> None:
        """sizes: of the chunks, for as many leading extents as are wanted. kind: as of `Pool.borrowed`."""
        self.views: list[Tensor | None] = []
        self._pool = pool
        self._reservation = reservation
        self._sizes = sizes[: len(reservation.extents)]
        self._kind = kind
        self._borrow = ExitStack()
        self._reads: list[tuple[int, Read]] = []
        self._bound: set[int] = set()

    def __enter__(self) -> Landing:
        extents, lineage = self._reservation.extents, self._reservation.lineage
        try:
            borrowed = self._pool.borrowed(extents[: len(self._sizes)], self._sizes, lineage, self._kind)
            self.views = self._borrow.enter_context(borrowed)
        except BaseException:
            self._pool.abort(extents)
            raise
        return self

    def read(self, lower: LowerTiers, key: bytes, extent: int) -> Found | None:
        """Read a chunk into an extent that is within reach; None: no tier had it in time."""
        assert all(read.is_over for _, read in self._reads)
        view = self.views[extent]
        assert view is not None
        read = lower.read(key, view)
        del view
        self._reads.append((extent, read))  # before it begins: an interrupt may come at any time
        return read.found()

    def promote(
        self, extents: Sequence[int], keys: Sequence[bytes], found: Sequence[Found], passage: Passage
    ) -> int:
        """Commit chunks that were read into these extents, each with the time that it has left; how many.

        Those that were forgotten since the passage was opened are not.
        """
        promoted = 0
        for ttl_ms, which in groupby(range(len(keys)), key=lambda at: ttl_left_ms(found[at])):
            with passage.ending() as forgotten:
                at = [each for each in which if keys[each] not in forgotten]
                if not at:
                    continue
                binding = [extents[i] for i in at]
                self._bound.update(binding)  # whatever comes of it: they are ours no more
                outcomes = self._pool.commit(
                    self._reservation.extents[binding],
                    [keys[i] for i in at],
                    [self._sizes[extent] for extent in binding],
                    self._reservation.lineage,
                    ttl_ms=ttl_ms,
                )
                promoted += outcomes.count(Outcome.COMMITTED)
        return promoted

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        extents = self._reservation.extents
        lent = [(extent, read) for extent, read in self._reads if not read.is_over]
        self._reads.clear()
        kept = self._borrow.pop_all() if lent else self._borrow
        for extent, read in lent:  # one at most: nothing is read while a call of before is under way
            read.when_over(partial(_give_back, self._pool, extents[extent : extent + 1], kept))
        if not lent:
            kept.close()
        self._pool.abort(np.delete(extents, [*self._bound, *(extent for extent, _ in lent)]))


def _give_back(pool: Pool, lent: Extents, borrow: ExitStack) -> None:
    borrow.close()
    with suppress(LocalStateError):  # the client was closed meanwhile: its reservations ended with it
        pool.abort(lent)
