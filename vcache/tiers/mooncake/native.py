"""Mooncake's client, guarded.

Its methods crash the process when they are called before `setup` or after `close`; `setup` and `close` hold
the GIL for as long as the master takes to answer, which is half a minute and more for one that is stopped.
So every call is counted in and out, `close` waits for those inside, a master that does not answer a question
of ours is not asked for more, and a forked child is refused.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from vcache.config import MooncakeConfig
from vcache.errors import EngineClosed, ForkedProcess, Unavailable
from vcache.limits import MIB, MOONCAKE_CLOSE_S, MOONCAKE_REACH_S, MOONCAKE_SEGMENT_MIN_BYTES

Answer = TypeVar("Answer")

os.environ.setdefault("MC_LOG_LEVEL", "ERROR")  # read when the library is loaded
os.environ.setdefault("MC_STORE_CLIENT_SETUP_RETRIES", "1")  # seconds instead of a minute and a half


_CALL: Final = struct.pack("<BBBBIIII", 21, 0, 0, 0, 1, 0xFFFF_FFFF, 0, 0)
"""To Mooncake's RPC: a call of a function that nobody has, which is answered with an error. The header of
yalantinglibs' coro_rpc: magic number, version, serialisation, kind, number, function, two lengths.
"""

_GET: Final = b"GET / HTTP/1.0\r\n\r\n"


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

        reach_s: how long the master may take to answer, if we have no connection.
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
        check_answers("tiers.mooncake.master", config.master, _CALL, reach_s)
        if config.metadata != "P2PHANDSHAKE":
            found = urlsplit(config.metadata)
            port = found.port or (443 if found.scheme == "https" else 80)
            check_answers("tiers.mooncake.metadata", f"{found.hostname}:{port}", _GET, reach_s)
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
        """End when nobody is inside any more; False if somebody still was after MOONCAKE_CLOSE_S, or if the
        master is stopped.

        Then the client stays as it is, to the end of the process: closing it under a call would crash it, and
        without an answer of the master's stop all its threads.
        """
        if os.getpid() != self._pid:
            return False
        with self._changed:
            self._is_closed = True
            if not self._changed.wait_for(lambda: not self._inside, MOONCAKE_CLOSE_S):
                return False
            store, self._store = self._store, None
        if store is not None and not _is_dead_or_answers(self._config.master):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(store))  # its destructor closes, too
            return False
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


def check_answers(field: str, address: str, question: bytes, timeout_s: float) -> None:
    """Raise Unavailable, naming the field, if nobody says anything there in time.

    To accept a connection means nothing: the kernel does that for a process that is stopped.
    """
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s) as asked:
            asked.sendall(question)
            asked.recv(1)
    except OSError as error:
        raise Unavailable(f"{field}: nobody answers at {address}: {error}") from error


def _is_dead_or_answers(master: str) -> bool:
    try:
        check_answers("tiers.mooncake.master", master, _CALL, MOONCAKE_REACH_S)
    except Unavailable as error:
        return not isinstance(error.__cause__, TimeoutError)
    return True


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
