"""One process' part in the pool, as both of LMCache's interfaces need it: session, segment, chunks, keys."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import msgspec

from integration.lmcache.device import Device
from integration.lmcache.promises import Pins, Promises
from integration.lmcache.reads import Reads
from integration.lmcache.settings import Settings, read
from vcache.engine.chunks import Chunks
from vcache.engine.lending import Lending
from vcache.engine.stats import Counters
from vcache.errors import LocalStateError, ServerError, Unavailable
from vcache.layout import KVLayout
from vcache.limits import KEEPER_INTERVAL_S, SEGMENT_WAIT_S
from vcache.logs import Line
from vcache.segment import parse_device

_log = logging.getLogger("vcache.integration.lmcache")


class Core:
    """A client, its chunks, and a thread that looks after them. Thread-safe.

    name: of the session, for people and for other engines. lends: whether this process lends a segment.
    on_turn: called by that thread every KEEPER_INTERVAL_S. owner: whose it is to close.
    """

    def __init__(
        self,
        given: Mapping[str, Any] | None,
        *,
        layout: KVLayout,
        model: str,
        name: str,
        lends: bool = True,
        device: str = "cpu",
    ) -> None:
        """Raises ConfigError for settings that are wrong, SegmentError for a segment that does not fit.

        device: what reads and writes chunks, as `Device`.
        """
        settings = read(given, **({} if lends else {"segment.size": 0}))
        with ExitStack() as undo:
            for tier in settings.tiers:
                undo.callback(tier.close)
            self._make(settings, undo, layout=layout, model=model, name=name, device=device)
            self._left = undo.pop_all()

    def _make(
        self, settings: Settings, undo: ExitStack, *, layout: KVLayout, model: str, name: str, device: str
    ) -> None:
        """All that there is to make; whatever has to be closed is in `undo` as soon as it is made."""
        config = settings.config
        self.device = Device(device)
        reaching = config.device
        if self.device.gpu is not None:  # peers' memory is mapped for the GPU that is to reach it
            reaching = f"cuda:{self.device.gpu}"
            if parse_device(config.device)[0] == "cuda":  # one file serves all ranks
                config = msgspec.structs.replace(config, device=reaching)
        self.config = config
        self.name = name
        self.counters = Counters()
        self.pins = Pins()
        self.promises = Promises()
        lending = Lending(config)
        undo.callback(lending.close)
        self.client = lending.client(name, reaching)
        undo.callback(self.client.close)
        self.reads = Reads()
        self.chunks = Chunks(
            self.client,
            layout=layout,
            model=model,
            device=config.device,
            counters=self.counters,
            tiers=settings.tiers,
            tier_queue_chunks=config.engine.tier_queue_chunks,
            tier_deadline_s=config.tiers.deadline_ms / 1e3,
            ttl_s=config.server.default_ttl_s,
            write_back=config.tiers.policy == "write-back",
            synchronise=self.device.synchronise,
            registrar=self.device.registrar,
        )
        undo.callback(self.chunks.close)
        self.owner: object = None
        self.on_turn: Callable[[], None] = _nothing_to_wait_for
        self._ending = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="vcache-lmcache-keeper", daemon=True)
        self._wait_for_room()
        self._keeper.start()

    def _wait_for_room(self) -> None:
        """Wait for the server, if there is one, and for our own segment: gigabytes take seconds."""
        if (
            not self.client.wait_connected(self.config.client.connect_timeout_ms / 1e3)
            and self.client.connected
        ):
            self.client.wait_connected(SEGMENT_WAIT_S)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._ending.is_set()

    def stats(self) -> dict[str, int | float]:
        """Counters and gauges, flat."""
        return {
            **self.counters.snapshot(),
            **{f"client_{name}": count for name, count in self.client.counters.items()},
            "connected": int(self.client.connected),
            "drafts": self.chunks.drafts,
            "held_chunks": self.chunks.held,
            "stocked_extents": self.chunks.stocked,
            "pins": len(self.pins),
            "promises": len(self.promises),
            "reads_in_flight": self.reads.in_flight,
            "reads_in_flight_peak": self.reads.peak,
            "reads_refused": self.reads.refused,
            "tier_waiting_chunks": self.chunks.tier_waiting,
        }

    def close(self) -> None:
        """Let go of everything and leave the pool. May be called again."""
        if self._ending.is_set():
            return
        self._ending.set()
        self._keeper.join()
        self.reads.close()
        self.device.turn()
        self.chunks.drop_all(self.pins.take_all())
        self.chunks.drop_all(self.promises.take_all())
        self._left.close()

    def _keep(self) -> None:
        while not self._ending.wait(KEEPER_INTERVAL_S):
            self.chunks.drop_all(self.promises.expired(time.monotonic()))
            try:
                self.device.turn()
                self.on_turn()
            except (Unavailable, ServerError, LocalStateError) as error:
                _log.debug(Line("nothing to look at now", reason=str(error)))
            except Exception:
                _log.exception("the keeper failed; it goes on")


def _nothing_to_wait_for() -> None:
    return
