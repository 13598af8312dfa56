"""Pool → pages under a grant that another process of this machine holds: copy, then ask the fence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vcache.client import Client, Grant
from vcache.engine.arguments import Transfer
from vcache.engine.copies import Copies
from vcache.engine.pool import Pool
from vcache.engine.stats import Cause, Counters
from vcache.errors import RemoteProtocolError, Unavailable


class GrantedLoads:
    """Loads chunks that somebody else acquired and pins until we are through. Thread-safe."""

    def __init__(self, client: Client, pool: Pool, copies: Copies, counters: Counters) -> None:
        self._client = client
        self._pool = pool
        self._copies = copies
        self._counters = counters

    def run(
        self,
        transfer: Transfer,
        extents: bytes,
        lineage: int,
        *,
        on_layer: Callable[[int], None] | None = None,
    ) -> list[bool]:
        """Copy the chunks of `transfer` out of `extents` (packed, in the same order) into its pages; of each,
        whether its pages hold now what was stored. When it returns, or raises, nothing touches them any more.

        on_layer: copy one layer after the other, and call this after each, when its copy has finished; the
        fence is asked after the last.
        """
        arrived = [False] * len(transfer)
        try:
            grant = self._client.adopt(extents, lineage)
        except Unavailable as error:
            self._counters.failed(Cause.NO_SERVER, error)
            return arrived
        except RemoteProtocolError as error:
            self._counters.failed(Cause.MALFORMED, error)
            return arrived
        if grant.extents["length"].tolist() != transfer.sizes:
            self._counters.failed(Cause.MALFORMED, "chunks have a wrong length")
            return arrived
        with self._counters.seconds("retrieve_seconds"):
            copied = self._scatter(transfer, grant, on_layer)
            if copied and self._pool.intact(grant, 0, len(transfer)):
                held = copied
            else:  # once more one by one, so that one broken chunk costs one chunk
                held = [at for at in copied if self._pool.intact(grant, at, at + 1)]
        for at in held:
            arrived[at] = True
        self._count(transfer, held)
        return arrived

    def _scatter(self, transfer: Transfer, grant: Grant, on_layer: Callable[[int], None] | None) -> list[int]:
        device = transfer.paged.device.type
        with self._pool.borrowed(grant.extents, transfer.sizes, grant.lineage, device) as views:
            within = [at for at, view in enumerate(views) if view is not None]
            chunks = [view for view in views if view is not None]
            if not within:
                return within
            picked = transfer.pick(within)
            if on_layer is None:
                self._copies.scatter(picked, chunks)
                return within
            for layer in range(len(transfer.paged.layers)):
                self._copies.scatter_layers(picked, chunks, range(layer, layer + 1)).wait()
                on_layer(layer)
            return within

    def _count(self, transfer: Transfer, held: Sequence[int]) -> None:
        sizes = [transfer.sizes[at] for at in held]
        self._counters.add(
            retrieve_calls=1,
            hits=len(held),
            misses=len(transfer) - len(held),
            retrieved_chunks=len(held),
            retrieved_bytes=sum(sizes),
            retrieved_tokens=sum(map(transfer.tokens_in, sizes)),
        )
