"""The demo's processes: started with a log each, spoken to with deadlines, and ended whatever happens."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from demo.messages import Command, Failed, Reply, WorkerSettings

START_SECONDS_MAX: Final = 120.0
"""For a process to be ready: importing torch and transformers can take long on a busy machine."""

SERVE_SECONDS_MAX: Final = 120.0
"""For one answer: forty times what it takes on an idle core."""

END_SECONDS_MAX: Final = 10.0
"""For a process to end after SIGTERM, before SIGKILL."""

POLL_SECONDS: Final = 0.02
LOG_LINES: Final = 15

PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None)

R = TypeVar("R")


class DemoFailed(Exception):
    """The demo did not show what it must show; the message says what was seen and what was expected."""


def die_with_parent() -> None:
    """Runs in the child before exec: a demo that is killed leaves no process behind."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def environment() -> dict[str, str]:
    """Return this process' environment without its VCACHE_* settings, which are for the user's own pool."""
    return {name: value for name, value in os.environ.items() if not name.startswith("VCACHE_")}


class Child:
    """One process of the demo, with a log file, in a session of its own: Ctrl-C is the demo's to handle."""

    def __init__(
        self,
        name: str,
        arguments: list[str],
        directory: Path,
        *,
        talks: bool = False,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = directory / f"{name.replace(' ', '-').replace(':', '')}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else log,
                stderr=log,
                cwd=Path(__file__).parent.parent,
                env={**environment(), **(environ or {})},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        self.process.kill()
        self.process.wait(END_SECONDS_MAX)

    def end(self) -> None:
        """Send SIGTERM, then SIGKILL; returns when the process has ended."""
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(END_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.kill()

    def failure(self, what: str) -> DemoFailed:
        """Return the error that `what` happened to this process, with the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return DemoFailed(
            "\n".join([f"{self.name}: {what}; its log ends with:", *(f"    {line}" for line in lines)])
        )

    def check_alive(self) -> None:
        """Raise `DemoFailed` when the process has ended."""
        if (code := self.process.poll()) is not None:
            raise self.failure(f"ended with exit code {code}")

    def wait_for_log(self, text: str) -> None:
        """Return when the log has `text`; raises `DemoFailed` at the deadline or when the process ended."""
        self.wait_until(
            lambda: text in self.log.read_text(errors="replace"), START_SECONDS_MAX, f"say {text!r}"
        )

    def wait_until(self, holds: Callable[[], bool], seconds_max: float, what: str) -> None:
        """Return when `holds()`; raises `DemoFailed` at the deadline or when the process ended."""
        deadline = time.monotonic() + seconds_max
        while not holds():
            self.check_alive()
            if time.monotonic() > deadline:
                raise self.failure(f"did not {what} within {seconds_max:.0f} s")
            time.sleep(POLL_SECONDS)


class WorkerProcess(Child):
    """A worker and the pipes to it."""

    def __init__(self, name: str, settings: WorkerSettings, directory: Path) -> None:
        argument = msgspec.json.encode(settings).decode()
        super().__init__(name, ["demo.worker", argument], directory, talks=True)
        self._received = b""

    def ask(self, command: Command, wanted: type[R]) -> R:
        """Send `command` and return the reply."""
        self.check_alive()
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(command) + b"\n")
        self.process.stdin.flush()
        return self.receive(wanted, SERVE_SECONDS_MAX)

    def receive(self, wanted: type[R], seconds_max: float) -> R:
        """Return the next message; raises `DemoFailed` when it is no `wanted`, is late, or cannot come."""
        reply = msgspec.json.decode(self._line(seconds_max), type=Reply)
        if isinstance(reply, Failed):
            raise self.failure(reply.error)
        if not isinstance(reply, wanted):
            raise self.failure(f"answered {type(reply).__name__}, wanted {wanted.__name__}")
        return reply

    def _line(self, seconds_max: float) -> bytes:
        assert self.process.stdout is not None
        descriptor, deadline = self.process.stdout.fileno(), time.monotonic() + seconds_max
        while b"\n" not in self._received:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise self.failure(f"gave no answer within {seconds_max:.0f} s")
            if not (part := os.read(descriptor, 1 << 16)):
                raise self.failure("ended without an answer")
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return line

    def end(self) -> None:
        """Close the worker's input, which ends it in order; then as any process."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):  # then by SIGTERM
            self.process.wait(END_SECONDS_MAX)
        super().end()
