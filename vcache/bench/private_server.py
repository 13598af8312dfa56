"""A metadata server for as long as a measurement or a test of the machine takes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vcache.config import Config, environ_of
from vcache.errors import Unavailable
from vcache.runtime import lock_holder

_START_S: Final = 20.0
"""It is ready in well under a second; the rest is for a machine that is busy."""

_END_S: Final = 10.0

_IDLE_EXIT_S: Final = 30.0
"""It ends by itself when whoever started it was killed."""

_POLL_S: Final = 0.01


@contextmanager
def private_server(path: Path, config: Config) -> Iterator[subprocess.Popen[bytes]]:
    """A server of the runtime directory `path`, for the block. Raises Unavailable with its last words."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VCACHE_")}
    environment |= environ_of(config) | {"VCACHE_RUNTIME_DIR": str(path), "VCACHE_LOG_FILE": "none"}
    command = [sys.executable, "-m", "metadata_server.server", "--idle-exit-s", str(_IDLE_EXIT_S)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_ready(process, path)
        except Unavailable as error:
            _end(process)
            log.seek(0)
            words = log.read().decode(errors="replace").strip().splitlines()
            raise Unavailable(f"{error}: {words[-1] if words else 'it said nothing'}") from error
        try:
            yield process
        finally:
            _end(process)


@contextmanager
def private_directory() -> Iterator[Path]:
    """A runtime directory of one's own, in memory where the machine lets us, removed afterwards."""
    shared_memory = "/dev/shm"
    parent = shared_memory if os.access(shared_memory, os.W_OK | os.X_OK) else None
    with tempfile.TemporaryDirectory(prefix="vc-", dir=parent, ignore_cleanup_errors=True) as name:
        yield Path(name)


def _wait_ready(process: subprocess.Popen[bytes], path: Path) -> None:
    """Until it has its lock; clients wait for the rest."""
    deadline_s = time.monotonic() + _START_S
    while lock_holder(path / "server.lock") is None:
        if process.poll() is not None:
            raise Unavailable(f"a metadata server for {path} ended with exit code {process.returncode}")
        if time.monotonic() > deadline_s:
            raise Unavailable(f"a metadata server for {path} was not ready within {_START_S:.0f} s")
        time.sleep(_POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
