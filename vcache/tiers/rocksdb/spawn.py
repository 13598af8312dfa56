"""Starting the owner of a database: detached from whoever needs it first, one for a directory."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Final

from vcache.errors import ConfigError
from vcache.limits import MIB
from vcache.locks import lock_holder
from vcache.logs import Line
from vcache.tiers.rocksdb.owner import LOCK, LOG

_log = logging.getLogger(__name__)

_LAUNCHER: Final = """
import os, sys
os.setsid()
if os.fork():
    os._exit(0)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Between us and the owner: its exit makes the owner nobody's child."""

_MALLOC: Final = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(512 * MIB)}
"""Of glibc. Otherwise it takes the memory of every large chunk anew from the kernel, page by page."""

_LAUNCH_TIMEOUT_S: Final = 10.0


def private_directory(path: Path, field: str) -> Path:
    """The directory, made if it is not there. Raises ConfigError if others could read or prepare it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.stat(path)
    except OSError as error:
        raise ConfigError(
            f"{field}: {path} cannot be made: {error.strerror}; wanted a directory of ours"
        ) from error
    mode = f"{found.st_mode & 0o777:o}"
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{field}: {path} belongs to user {found.st_uid} with mode {mode}, "
            f"wanted a directory of user {os.geteuid()} with mode 700: what lies there is served as KV"
        )
    return path


def start_owner(directory: Path, capacity_bytes: int, ttl_s: float) -> bool:
    """Start an owner if none is there; True if this call did. It is not waited for. Failures are logged."""
    try:
        if lock_holder(directory / LOCK) is not None:
            return False
        log = os.open(directory / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except (OSError, ConfigError) as error:
        _log.error(Line("no owner of the database can be started", error=str(error)))
        return False
    arguments = [
        sys.executable,
        "-m",
        "vcache.tiers.rocksdb.owner",
        str(directory),
        f"--capacity-bytes={capacity_bytes}",
        f"--ttl-s={ttl_s}",
    ]
    try:
        launched = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=_environment(),
            timeout=_LAUNCH_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.error(Line("no owner of the database can be started", error=str(error)))
        return False
    finally:
        os.close(log)
    return launched.returncode == 0


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VCACHE_")}
    places = [str(Path(__file__).parents[3]), environment.get("PYTHONPATH", "")]
    environment |= _MALLOC
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    return environment
