"""`python -m demo`: exit code 0 when all was shown, 1 when something was wrong, 2 for a tier not there."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from demo.processes import DemoFailed
from demo.report import make_console
from demo.story import Story
from demo.tiers import TIERS, lower_tier
from vcache.errors import VCacheError


def private_directory() -> Path:
    """Make a directory of mode 0700 for sockets, table and logs, its path short enough for a socket."""
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), "/dev/shm", "/tmp"):
        if parent and len(parent) < 40 and os.access(parent, os.W_OK):
            return Path(tempfile.mkdtemp(prefix="vcache-demo-", dir=parent))
    return Path(tempfile.mkdtemp(prefix="vcache-demo-"))


def end_on_sigterm(*_: object) -> None:
    """Turn SIGTERM into an orderly end, children included."""
    sys.exit(128 + signal.SIGTERM)


def main() -> int:
    """Tell the story once; return the exit code."""
    console = make_console()
    name = os.environ.get("TIER", "")
    if name not in ("", *TIERS):
        console.print(f"[red]TIER={name}: wanted nothing, {' or '.join(TIERS)}.[/red]")
        return 2
    signal.signal(signal.SIGTERM, end_on_sigterm)
    started = time.monotonic()
    try:
        with ExitStack() as stack:
            directory = private_directory()
            stack.callback(shutil.rmtree, directory)
            try:
                tier = lower_tier(name, directory, stack)
            except VCacheError as error:
                console.print(f"TIER={name}: {error}", style="red", markup=False)
                return 2
            story = Story(console, directory, stack, tier)
            story.start()
            story.share()
            story.kill_worker()
            story.kill_server()
            if tier:
                new = private_directory()
                stack.callback(shutil.rmtree, new)
                story.end_everything(new)
            story.summary()
    except DemoFailed as failure:
        console.print("\n[bold red]The demo failed.[/bold red]")
        console.print(str(failure), markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted; all processes were ended.")
        return 130
    console.print(f"Done in {time.monotonic() - started:.0f} s; all processes ended, nothing is left behind.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
