"""All figures of one run, with what they ran on: `python -m benchmarks [PART …] [--write]`."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Final

from rich.console import Console

from benchmarks import engine, server, transports
from benchmarks.report import ROOT, Figure, commit, console, cpu, machine, markdown, show, summary

PARTS: Final[dict[str, tuple[str, Callable[[], list[Figure]]]]] = {
    "server": (server.TITLE, server.run),
    "engine": (engine.TITLE, engine.run),
    "transports": (transports.TITLE, transports.run),
}
RESULTS: Final = ROOT / "benchmarks" / "results"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all, in this order)"
    )
    parser.add_argument(
        "--write", action="store_true", help="also to benchmarks/results/<date>-<CPU>-<commit>.md"
    )
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a wanted bound was missed")
    parsed = parser.parse_args(argv)
    if unknown := sorted(set(parsed.parts) - set(PARTS)):
        parser.error(f"PART: got {', '.join(unknown)}, wanted {', '.join(PARTS)}")
    return parsed


def write(tables: dict[str, list[Figure]]) -> Path:
    """The result as a file, named after day, CPU and commit."""
    name = re.sub(r"[^a-z0-9]+", "-", cpu().lower()).strip("-")
    path = RESULTS / f"{date.today()}-{name}-{commit()}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(markdown(tables), encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0, or with `--strict` 1 if a wanted bound was missed."""
    asked = arguments(argv)
    out, errors = console(), Console(stderr=True)
    tables: dict[str, list[Figure]] = {}
    for name in asked.parts or PARTS:
        title, run = PARTS[name]
        with errors.status(f"measuring: {name}"):
            tables[title] = run()
        show(title, tables[title], out)
    figures = [figure for table in tables.values() for figure in table]
    out.print(summary(figures), highlight=False)
    print(machine())
    if asked.write:
        print(f"written: {write(tables).relative_to(ROOT)}")
    return int(asked.strict and any(figure.met is False for figure in figures))


if __name__ == "__main__":
    logging.getLogger("vcache").setLevel(logging.ERROR)  # servers are killed on purpose here
    sys.exit(main())
