"""Forget all chunks in the pool, or those of one model; what is pinned stays until it is released."""

from __future__ import annotations

import argparse
import sys

from vcache.cli import present
from vcache.cli.connect import connected
from vcache.cli.exits import Exit
from vcache.cli.invocation import Invocation
from vcache.cli.models import namespaces_of
from vcache.errors import ArgumentError


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vcache clear`."""
    parser.add_argument("--model", metavar="NAME", help="only its chunks, as `vcache list` names it")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def run(invocation: Invocation) -> int:
    """Ask, forget, and say how many chunks there were."""
    model: str | None = invocation.options.model
    with connected(invocation.observing(), "vcache clear") as client:
        if not invocation.options.yes and not _is_sure(int(client.stats().counters["chunks"]), model):
            print("vcache: nothing was forgotten", file=sys.stderr)
            return Exit.FAILED
        if model is None:
            removed = client.clear()
        else:
            spaces = namespaces_of(model, client.stats().labels)
            removed = sum(client.clear(space) for space in spaces)
    if invocation.as_json:
        present.write_json({"removed": removed, "model": model})
    else:
        present.console().print(present.text(f"forgot {removed:,} chunks"))
    return Exit.OK


def _is_sure(chunks: int, model: str | None) -> bool:
    """Whether the person at the terminal says yes. Raises ArgumentError where nobody sits."""
    what = f"all {chunks:,} chunks" if model is None else f"the chunks of {model!r}"
    if not sys.stdin.isatty():
        raise ArgumentError("--yes", "nothing", f"--yes where nobody can be asked: this forgets {what}")
    print(f"Forget {what}? They would have to be computed again. [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
