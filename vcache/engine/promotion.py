"""From a lower tier into the pool: what was read is committed, what a tier still reads into stays lent."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import groupby

from vcache.client import Reservation
from vcache.engine.lower import Late, ttl_left_ms
from vcache.engine.passages import Passage
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
    passage: Passage,
) -> int:
    """Commit chunks that were read into reserved extents, each with the time that it has left; how many.

    Those that were forgotten since the passage was opened are not: their extents are given back.
    """
    promoted = 0
    bound: set[int] = set()
    for ttl_ms, which in groupby(range(len(keys)), key=lambda at: ttl_left_ms(found[at])):
        with passage.ending() as forgotten:
            at = [each for each in which if keys[each] not in forgotten]
            if at:
                outcomes = pool.commit(
                    reservation.extents[[extents[i] for i in at]],
                    [keys[i] for i in at],
                    [sizes[i] for i in at],
                    reservation.lineage,
                    ttl_ms=ttl_ms,
                )
                promoted += outcomes.count(Outcome.COMMITTED)
        bound.update(at)
    pool.abort(reservation.extents[[extents[at] for at in range(len(keys)) if at not in bound]])
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
