"""A client that lends a small segment to a pool of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.processes.pool import Pool as Processes
from tests.processes.worker import DEADLINE_S
from vcache.client import Client
from vcache.config import load
from vcache.engine.lending import Lending


@contextmanager
def lending_client(name: str) -> Iterator[Client]:
    """It is connected, and ends with its server."""
    with Processes() as processes:
        processes.start_server()
        options = {**processes.client_config(), "device": "shm:0", "segment.size": "1MiB"}
        lending = Lending(load(**options).config)
        client = lending.client(name)
        assert client.wait_connected(DEADLINE_S)
        yield client
        client.close()
        lending.close()
