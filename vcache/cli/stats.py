"""The server's counters, segments and sessions, as they are now."""

from __future__ import annotations

import argparse
import os
from typing import Any

from vcache.cli import pool_tables, present
from vcache.cli.connect import connected
from vcache.cli.exits import Exit
from vcache.cli.invocation import Invocation
from vcache.protocol import Statistics
from vcache.runtime import runtime_path


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vcache stats`."""
    parser.add_argument("--counters", action="store_true", help="show every counter too")


def run(invocation: Invocation) -> int:
    """Ask the server and print what it says."""
    with connected(invocation.observing(), "vcache stats") as client:
        statistics = client.stats()
    if invocation.as_json:
        present.write_json(as_json(statistics))
        return Exit.OK
    console = present.console()
    console.print(pool_tables.summary(statistics, str(runtime_path(invocation.config.runtime_dir))))
    console.print(pool_tables.segments(statistics))
    console.print(pool_tables.sessions(statistics, leave_out_pid=os.getpid()))
    if invocation.options.counters:
        console.print(pool_tables.counters(statistics))
    return Exit.OK


def as_json(statistics: Statistics) -> dict[str, Any]:
    """What `--json` prints: counters, segments (with the holder's pid), sessions without our own, labels."""
    holders = pool_tables.holders(statistics)
    segments = [
        {**present.plain(row), "pid": holders[row.session].pid if row.session in holders else None}
        for row in statistics.segments
    ]
    return {
        "counters": statistics.counters,
        "segments": segments,
        "sessions": [row for row in statistics.sessions if row.pid != os.getpid()],
        "labels": statistics.labels,
    }
