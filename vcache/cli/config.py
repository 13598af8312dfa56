"""The effective configuration, and where each value came from: default, file, variable or option."""

from __future__ import annotations

import argparse

from vcache.cli import present
from vcache.cli.exits import Exit
from vcache.cli.invocation import Invocation
from vcache.runtime import runtime_path


def arguments(parser: argparse.ArgumentParser) -> None:
    """`vcache config` has no options of its own."""


def run(invocation: Invocation) -> int:
    """Print every field; needs no server."""
    rows = invocation.loaded.describe()
    runtime_dir = str(runtime_path(invocation.config.runtime_dir))
    if invocation.as_json:
        fields = {row.name: {"value": row.value, "origin": row.origin} for row in rows}
        present.write_json({"runtime_dir": runtime_dir, "fields": fields})
        return Exit.OK
    table = present.table("", "field", "value", "origin")
    for row in rows:
        style = "dim" if row.origin == "default" else None
        present.add_row(table, [row.name, _shown(row.name, row.value), row.origin], style)
    console = present.console()
    console.print(table)
    console.print(present.text(f"runtime directory: {runtime_dir}"))
    return Exit.OK


def _shown(name: str, value: bool | int | float | str | None) -> str:
    """As it would be written in a file; sizes that nobody reads in bytes in larger units too."""
    is_size = name.endswith("size") or "bytes" in name  # others are counts
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value >= 1 << 20 and is_size:
        return f"{value} ({present.size(value)})"
    return str(value)
