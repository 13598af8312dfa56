"""The lower tier of `make demo TIER=…`: what it needs, and the workers' configuration for it."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from demo.processes import POLL_SECONDS, Child

TIERS: Final = ("rocksdb", "mooncake")

DEADLINE_MS: Final = 20_000
"""A miss would end the demo, so a tier on a busy machine gets more time than it would in production."""


def lower_tier(name: str, logs: Path, stack: ExitStack) -> dict[str, str | int]:
    """Start what the tier `name` ("" for none) needs, ended by `stack`; the fields of the configuration.

    Raises VCacheError: what is missing.
    """
    if name == "rocksdb":
        return {
            "tiers.order": name,
            "tiers.rocksdb.directory": _directory(stack),
            "tiers.deadline_ms": DEADLINE_MS,
        }
    if name == "mooncake":
        return {
            "tiers.order": name,
            "tiers.mooncake.master": _master(logs, stack),
            "tiers.deadline_ms": DEADLINE_MS,
        }
    return {}


def _directory(stack: ExitStack) -> str:
    from vcache.config import load
    from vcache.locks import lock_holder
    from vcache.tiers.configured import rocks_tier

    path = tempfile.mkdtemp(prefix="vcache-demo-")  # on a disk where /tmp is on one
    tier = rocks_tier(load(environ={}, **{"tiers.rocksdb.directory": path}).config)

    def end() -> None:
        from vcache.tiers.rocksdb.owner import LOCK

        tier.close()
        pid = lock_holder(Path(path) / LOCK)
        if pid:
            os.kill(pid, signal.SIGKILL)
        while lock_holder(Path(path) / LOCK) is not None:
            time.sleep(POLL_SECONDS)
        shutil.rmtree(path)

    stack.callback(end)
    return path


def _master(logs: Path, stack: ExitStack) -> str:
    """A master and a holder; they play the other machines."""
    from vcache.tiers.mooncake.master import free_port, program

    program("mooncake_master")
    port = free_port("127.0.0.1")
    arguments = ["vcache.cli", "mooncake", "up", "--port", str(port), "--size", "256MiB"]
    child = Child("mooncake", arguments, logs)
    stack.callback(child.end)
    child.wait_for_log("answers at")
    return f"127.0.0.1:{port}"
