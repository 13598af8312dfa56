"""From a lower tier into the pool: what was read is committed, what a tier still reads into stays lent."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import groupby

from vcache.client import Reservation
from vcache.engine.lower import Late, ttl_left_ms
from vcache.engine.pool import Pool
from vcache.errors import LocalStateError
from vcache.protocol import Outcome
from vcache.tiers import Found


def promote(
    pool: Pool,
    reservation: Reservation,
    extents: Sequence[int],
    keys: Sequence[bytes],
    sizes: Sequence[int],
    found: Sequence[Found],
) -> int:
    """Commit chunks that were read into reserved extents, each with the time that it has left; how many."""
    promoted = 0
    for ttl_ms, which in groupby(range(len(keys)), key=[ttl_left_ms(each) for each in found].__getitem__):
        at = list(which)
        outcomes = pool.commit(
            reservation.extents[[extents[i] for i in at]],
            [keys[i] for i in at],
            [sizes[i] for i in at],
            reservation.lineage,
            ttl_ms=ttl_ms,
        )
        promoted += outcomes.count(Outcome.COMMITTED)
    return promoted


def leave_lent(pool: Pool, reservation: Reservation, extent: int, late: Late) -> None:
    """Keep an extent reserved and its memory mapped until a tier's call has returned, then give it back.

    To be called while the memory is borrowed.
    """
    part = reservation.extents[extent : extent + 1]
    kept = ExitStack()
    kept.enter_context(pool.borrowed(part, part["length"].tolist(), reservation.lineage))

    def give_back() -> None:
        kept.close()
        with suppress(LocalStateError):  # the client was closed meanwhile: its reservations ended with it
            pool.abort(part)

    late.when_over(give_back)
