"""A client of the server that is there; commands that look at a pool neither start one nor wait for one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vcache.client import Client
from vcache.config import Config
from vcache.errors import Unavailable
from vcache.runtime import RuntimeDir, lock_holder, runtime_path


class NoServer(Unavailable):
    """No process holds the server's lock of this pool."""

    def __init__(self, path: Path) -> None:
        self.advice = (
            f"start one with `vcache-metadata --runtime-dir {path}`, "
            "or name another pool's directory with --runtime-dir"
        )
        super().__init__(f"no metadata server runs for {path}: {self.advice}")


def server_pid(config: Config) -> int | None:
    """The process that holds the server's lock of this pool; None if there is none. Makes nothing.

    0 if the process is in another container and has no number here.
    """
    path = runtime_path(config.runtime_dir)
    if not os.path.lexists(path):
        return None
    runtime = RuntimeDir.resolve(config.runtime_dir, group=config.server.group)
    return lock_holder(runtime.lock_path)


@contextmanager
def connected(config: Config, name: str) -> Iterator[Client]:
    """A client with a session, ended afterwards. Raises NoServer, or Unavailable with the reason in words."""
    pid = server_pid(config)
    if pid is None:
        raise NoServer(runtime_path(config.runtime_dir))
    client = Client(config, name=name)
    try:
        if not client.wait_connected(config.client.connect_timeout_ms / 1e3):
            _explain(client, pid)
        yield client
    finally:
        client.close()


def _explain(client: Client, pid: int) -> None:
    """Raise why there is no session, unless there is one by now."""
    try:
        client.ping()
    except Unavailable as error:
        raise Unavailable(
            f"the metadata server (process {pid or 'in another container'}) does not serve us: {error}"
        ) from error
