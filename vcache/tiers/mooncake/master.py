"""A Mooncake master on this machine, for development and for tests."""

from __future__ import annotations

import ctypes
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Final

from vcache.errors import ConfigError, Unavailable

_START_S: Final = 30.0
_END_S: Final = 10.0
_PR_SET_PDEATHSIG: Final = 1

_libc = ctypes.CDLL(None)


class Master:
    """A running `mooncake_master`, bound to `host`; a context manager that ends it.

    port, metrics_port: 0: free ones. lease_s: how long a key that was looked at is not evicted. offload:
    whether holders may offload to their SSDs. http_metadata_port: serve Mooncake's HTTP metadata there, too;
    None: no, and clients use P2PHANDSHAKE. log: where it writes; None: nowhere.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        metrics_port: int = 0,
        *,
        lease_s: float = 5.0,
        offload: bool = False,
        http_metadata_port: int | None = None,
        options: tuple[str, ...] = (),
        log: Path | None = None,
    ) -> None:
        self.host = host
        self.port = port or free_port(host)
        metrics_port = metrics_port or free_port(host)
        self._command = [
            str(program("mooncake_master")),
            f"--rpc_address={host}",
            f"--rpc_port={self.port}",
            f"--metrics_host={host}",
            f"--metrics_port={metrics_port}",
            f"--default_kv_lease_ttl={int(lease_s * 1000)}",
            *(["--enable_offload=true"] if offload else []),
            *options,
        ]
        self.metadata = "P2PHANDSHAKE"
        if http_metadata_port is not None:
            http_port = http_metadata_port or free_port(host)
            self.metadata = f"http://{host}:{http_port}/metadata"
            self._command += [
                "--enable_http_metadata_server=true",
                f"--http_metadata_server_host={host}",
                f"--http_metadata_server_port={http_port}",
            ]
        self._log = log
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """What clients are configured with."""
        return f"{self.host}:{self.port}"

    @property
    def exit_code(self) -> int | None:
        """Of the program, once it has ended; None while it runs, or was not started."""
        return None if self.process is None else self.process.poll()

    def start(self) -> Master:
        """Start it and wait until it answers. Raises Unavailable: it ended, or does not answer."""
        # A master whose port is taken by another one may end only after that one has answered for it.
        if _accepts(self.host, self.port):
            raise Unavailable(f"something else answers at {self.address} already")
        output = subprocess.DEVNULL if self._log is None else self._log.open("ab")
        try:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=_die_with_us
            )
        finally:
            if not isinstance(output, int):
                output.close()
        deadline_s, pause = time.monotonic() + _START_S, threading.Event()
        while not _accepts(self.host, self.port):
            if self.process.poll() is not None:
                raise Unavailable(
                    f"mooncake_master ended with {self.process.returncode}: is a port taken? It was started "
                    f"with {' '.join(self._command[1:])}"
                )
            if time.monotonic() > deadline_s:
                self.end()
                raise Unavailable(f"mooncake_master does not answer at {self.address} after {_START_S:.0f} s")
            pause.wait(0.02)
        return self

    def kill(self) -> None:
        """SIGKILL, and wait."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(_END_S)

    def end(self) -> None:
        """SIGTERM, then SIGKILL, and wait."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        self.process.send_signal(signal.SIGCONT)  # one that is stopped would not hear of it
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> Master:
        return self.start() if self.process is None else self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def program(name: str) -> Path:
    """A program of the installed Mooncake wheel. Raises ConfigError."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        how = "pip install -e '.[mooncake]' in VCache's clone"
        raise ConfigError(f"{name}: not there; it comes with Mooncake: {how}")
    return Path(found)


def free_port(host: str) -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as asked:
        asked.bind((host, 0))
        return int(asked.getsockname()[1])


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _die_with_us() -> None:
    """In the child before exec: an orphaned master would answer whoever comes to its port next."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
