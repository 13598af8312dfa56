"""Mooncake's client, guarded.

Its methods crash the process when they are called before `setup` or after `close`; `setup` and `close` hold
the GIL, and `setup` without a master does so for seconds. So every call is counted in and out, `close` waits
for those inside, a master that cannot be reached over TCP is not asked for, and a forked child is refused.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from vcache.config import MooncakeConfig
from vcache.errors import EngineClosed, ForkedProcess, Unavailable
from vcache.limits import MIB, MOONCAKE_CLOSE_S, MOONCAKE_SEGMENT_MIN_BYTES

Answer = TypeVar("Answer")

os.environ.setdefault("MC_LOG_LEVEL", "ERROR")  # read when the library is loaded
os.environ.setdefault("MC_STORE_CLIENT_SETUP_RETRIES", "1")  # seconds instead of a minute and a half


class Native:
    """One client of a store. Thread-safe. It connects on the first call, and again after it could not."""

    def __init__(self, config: MooncakeConfig) -> None:
        self._config = config
        self._pid = os.getpid()
        self._store: Any = None
        self._is_closed = False
        self._inside = 0
        self._changed = threading.Condition()
        self._connecting = threading.Lock()

    @contextmanager
    def store(self, reach_s: float) -> Iterator[Any]:
        """The connected client, for the block. Raises Unavailable, EngineClosed, ForkedProcess.

        reach_s: how long the master may take to accept a connection, if we have none.
        """
        if os.getpid() != self._pid:
            raise ForkedProcess("the Mooncake client was made before fork(): make another one in the child")
        with self._changed:
            if self._is_closed:
                raise EngineClosed("tier 'mooncake' is closed")
            self._inside += 1
        try:
            yield self._connected(reach_s)
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def _connected(self, reach_s: float) -> Any:
        if self._store is not None:
            return self._store
        with self._connecting:
            if self._store is None:
                self._store = self._set_up(reach_s)
            return self._store

    def _set_up(self, reach_s: float) -> Any:
        from mooncake.store import MooncakeDistributedStore

        config = self._config
        check_reachable("tiers.mooncake.master", config.master, reach_s)
        if config.metadata != "P2PHANDSHAKE":
            found = urlsplit(config.metadata)
            port = found.port or (443 if found.scheme == "https" else 80)
            check_reachable("tiers.mooncake.metadata", f"{found.hostname}:{port}", reach_s)
        store = MooncakeDistributedStore()
        options: dict[str, Any] = {}
        if config.offload_directory is not None:
            Path(config.offload_directory).mkdir(mode=0o700, parents=True, exist_ok=True)
            options = {"enable_ssd_offload": True, "ssd_offload_path": config.offload_directory}
        lend = max(config.lend, MOONCAKE_SEGMENT_MIN_BYTES) if config.lend else 0
        code = store.setup(
            config.host,
            config.metadata,
            lend,
            16 * MIB,
            protocol_of(config),
            config.devices or "",
            config.master,
            **options,
        )
        if code != 0:
            raise Unavailable(f"Mooncake's setup with the master at {config.master} failed with {code}")
        return store

    def close(self) -> bool:
        """End when nobody is inside any more; False if somebody still was after MOONCAKE_CLOSE_S.

        Then the client stays as it is: closing it under a call would crash the process.
        """
        if os.getpid() != self._pid:
            return False
        with self._changed:
            self._is_closed = True
            if not self._changed.wait_for(lambda: not self._inside, MOONCAKE_CLOSE_S):
                return False
            store, self._store = self._store, None
        if store is not None:
            if self._config.offload_directory is not None:
                # Otherwise a client that restarts soon finds none of what it had offloaded.
                store.unmount_local_disk_segment()
            store.close()
        return True


def protocol_of(config: MooncakeConfig) -> str:
    """tcp or rdma: what is configured, else rdma where there is a device for it."""
    if config.protocol != "auto":
        return config.protocol
    devices = Path("/sys/class/infiniband")
    return "rdma" if devices.is_dir() and any(devices.iterdir()) else "tcp"


def check_reachable(field: str, address: str, timeout_s: float) -> None:
    """Raise Unavailable, naming the field, if nobody accepts a TCP connection there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except OSError as error:
        raise Unavailable(f"{field}: nobody answers at {address}: {error}") from error


def tried(call: Callable[[], Answer], again: Callable[[Answer], bool], pauses_s: list[float]) -> Answer:
    """Call until `again` does not ask for more, with these pauses in between."""
    pause = threading.Event()
    answer = call()
    for pause_s in pauses_s:
        if not again(answer):
            break
        pause.wait(pause_s)
        answer = call()
    return answer
