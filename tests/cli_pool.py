"""For tests of the command line: a real server, chunks in its pool, and `vcache` as people call it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vcache.bench.private_server import private_server
from vcache.client import Client
from vcache.config import Config, load
from vcache.keys import namespace
from vcache.limits import EXTENT_ALIGN_BYTES, FINGERPRINT_BYTES, KEY_BYTES, MIB
from vcache.segment import allocate

ROOT = Path(__file__).parent.parent
DEADLINE_S = 60.0


def config_of(path: Path) -> Config:
    """Of a client in a test: patient, no autostart."""
    return load(
        environ={},
        runtime_dir=str(path),
        server={"autostart": False},
        client={"request_timeout_ms": 10_000, "connect_timeout_ms": 10_000, "declare_interval_s": 0.1},
    ).config


@contextmanager
def server(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real metadata server."""
    with private_server(path, config_of(path)) as process:
        yield process


@contextmanager
def lender(path: Path) -> Iterator[Client]:
    """A client that lends 8 MiB."""
    client = Client(config_of(path), name="lender", new_segment=lambda: allocate("shm:0", 8 * MIB))
    try:
        assert client.wait_connected(DEADLINE_S) and client.own_segment
        yield client
    finally:
        client.close()


def store(client: Client, model: str, count: int) -> list[bytes]:
    """Commit `count` chunks of one page; returns their keys."""
    keys = [secrets.token_bytes(KEY_BYTES) for _ in range(count)]
    layout = b"L" * FINGERPRINT_BYTES
    client.describe(namespace(model), model)
    extents = client.reserve(keys, layout=layout, size=EXTENT_ALIGN_BYTES).extents
    client.commit(extents, keys, [EXTENT_ALIGN_BYTES] * count, namespace=namespace(model))
    assert client.lookup(keys, layout) == count
    return keys


def command(*arguments: str) -> list[str]:
    """`vcache` in a process of its own."""
    return [sys.executable, "-m", "vcache.cli", *arguments]


def environment(**variables: str) -> dict[str, str]:
    """Of that process."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


def vcache(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        command(*arguments),
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=DEADLINE_S,
    )


def vcache_json(*arguments: str) -> Any:
    """Run it with --json; what it printed."""
    ran = vcache(*arguments, "--json")
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)
