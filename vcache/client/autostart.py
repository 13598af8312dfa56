"""Starting a metadata server when there is none: one for all, detached from whoever came first."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from vcache.client.wire import Wire
from vcache.config import Config, environ_of
from vcache.errors import ConfigError, LocalStateError, Unavailable
from vcache.limits import AUTOSTART_INTERVAL_S
from vcache.runtime import OwnerLock, RuntimeDir, lock_holder

_log = logging.getLogger(__name__)

_LAUNCHER: Final = """
import os, sys
os.setsid()
if os.fork():
    os._exit(0)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Between us and the server: its exit makes the server nobody's child, so that it is not killed with our
process tree and leaves no zombie with us."""

_LAUNCH_TIMEOUT_S: Final = 10.0


def start_server(config: Config, runtime: RuntimeDir) -> bool:
    """Start a metadata server, unless one is there, somebody is just starting one, or a try was made lately.

    True if this call started one. It is not waited for. Failures are logged.
    """
    path = runtime.autostart_lock_path
    # A server that was killed keeps its lock until the kernel has closed all that it had: one that starts
    # before would only find that out, and the try be spent.
    if _tried_lately(path) or lock_holder(runtime.lock_path) is not None:
        return False
    try:
        lock = OwnerLock(path, mode=runtime.file_mode)
        if not lock.try_acquire():
            return False
    except (LocalStateError, ConfigError) as error:
        # Another client of this very process is at it, or we have no right to.
        _log.debug("autostart: %s", error)
        return False
    try:
        if _tried_lately(path) or _is_there(runtime):
            return False
        _mark_tried(path)
        return _launch(config, runtime)
    except OSError as error:
        _log.error("no metadata server could be started: %s", error)
        return False
    finally:
        lock.release()


def _tried_lately(path: Path) -> bool:
    """Whether somebody tried within AUTOSTART_INTERVAL_S: the lock file then has a byte, and its time is that
    of the try.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return found.st_size > 0 and 0 <= time.time() - found.st_mtime < AUTOSTART_INTERVAL_S


def _mark_tried(path: Path) -> None:
    # By path: opening the file and closing it again would give the lock up.
    os.truncate(path, 1)
    os.utime(path)


def _is_there(runtime: RuntimeDir) -> bool:
    try:
        Wire.dial(runtime.session_path, lambda: None).close()
    except Unavailable:
        return False
    return True


def _launch(config: Config, runtime: RuntimeDir) -> bool:
    arguments = ["-m", "metadata_server.server", "--runtime-dir", str(runtime.path), "--autostarted"]
    try:
        log = os.open(
            runtime.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, runtime.file_mode
        )
        try:
            launcher = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                close_fds=True,
                cwd="/",
                env=_environment(config, runtime),
                timeout=_LAUNCH_TIMEOUT_S,
                check=False,
            )
        finally:
            os.close(log)
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.error("no metadata server could be started: %s", error)
        return False
    if launcher.returncode:
        _log.error("no metadata server could be started; see %s", runtime.log_path)
        return False
    _log.info("started a metadata server for %s; its log is %s", runtime.path, runtime.log_path)
    return True


def _environment(config: Config, runtime: RuntimeDir) -> dict[str, str]:
    """Ours, with exactly our configuration, and able to find the server's package from any directory."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VCACHE_")}
    environment |= environ_of(config)
    environment["VCACHE_RUNTIME_DIR"] = str(runtime.path)
    environment["VCACHE_LOG_FILE"] = "none"  # ours is not the server's; it writes to the log that it is given
    found = importlib.util.find_spec("metadata_server")
    places = list(found.submodule_search_locations or ()) if found is not None else []
    inherited = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
    environment["PYTHONPATH"] = os.pathsep.join([*(str(Path(place).parent) for place in places), *inherited])
    return environment
