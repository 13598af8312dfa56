"""All figures of one run, with what they ran on: `python -m benchmarks [PART …] [--write]`.

The parts that need a GPU (`gpu` is all of them) are measured only when they are named.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from benchmarks import engine, server, transports
from benchmarks.gpu import copies, host, lmcache_kernel, matmul, peers, pieces, retrieve
from benchmarks.gpu.device import NoGPU, gpus
from benchmarks.report import (
    ROOT,
    Figure,
    commit,
    console,
    cpu,
    gpus_named,
    machine,
    markdown,
    result_path,
    show,
    summary,
)

Run = Callable[[], Iterable[Figure]]

PARTS: Final[dict[str, tuple[str, Run]]] = {
    "server": (server.TITLE, server.run),
    "engine": (engine.TITLE, engine.run),
    "transports": (transports.TITLE, transports.run),
}
"""On every machine."""


def _on_gpus(run: Callable[[Sequence[str]], Iterable[Figure]]) -> Run:
    return lambda: run(gpus())


GPU_PARTS: Final[dict[str, tuple[str, Run]]] = {
    "gpu-copies": (copies.TITLE, _on_gpus(copies.run)),
    "gpu-retrieve": (retrieve.TITLE, _on_gpus(retrieve.run)),
    "gpu-lmcache": (lmcache_kernel.TITLE, _on_gpus(lmcache_kernel.run)),
    "gpu-host": (host.TITLE, _on_gpus(host.run)),
    "gpu-matmul": (matmul.TITLE, _on_gpus(matmul.run)),
    "gpu-pieces": (pieces.TITLE, _on_gpus(pieces.run)),
    "gpu-peers": (peers.TITLE, _on_gpus(peers.run)),
}
"""What is worth most comes first, should the time run out."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"{', '.join(PARTS)} (default: these, in this order); gpu, or of it {', '.join(GPU_PARTS)}",
    )
    parser.add_argument(
        "--write", action="store_true", help="also to benchmarks/results/<date>-<CPU or GPU>-<commit>.md"
    )
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a wanted bound was missed")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also there, as they come, for programs")
    parsed = parser.parse_args(argv)
    if unknown := sorted(set(parsed.parts) - {*PARTS, *GPU_PARTS, "gpu"}):
        parser.error(f"PART: got {', '.join(unknown)}, wanted {', '.join((*PARTS, 'gpu', *GPU_PARTS))}")
    named = [each for part in parsed.parts for each in (GPU_PARTS if part == "gpu" else [part])]
    parsed.parts = list(dict.fromkeys(named)) or list(PARTS)
    return parsed


def write(tables: dict[str, list[Figure]], hardware: str) -> Path:
    """The result as a file, named after day, hardware and commit."""
    path = result_path(hardware, commit())
    path.parent.mkdir(exist_ok=True)
    path.write_text(markdown(tables), encoding="utf-8")
    return path


def _as_json(tables: dict[str, list[Figure]]) -> str:
    return json.dumps({title: [vars(row) for row in rows] for title, rows in tables.items()})


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0, with `--strict` 1 if a wanted bound was missed, 2 where a GPU is needed."""
    asked = arguments(argv)
    out, errors = console(), Console(stderr=True)
    if set(asked.parts) & set(GPU_PARTS):
        try:
            gpus()
        except NoGPU as error:
            errors.print(f"python -m benchmarks: {error}", highlight=False)
            return 2
    tables: dict[str, list[Figure]] = {}
    for name in asked.parts:
        title, run = {**PARTS, **GPU_PARTS}[name]
        rows = tables.setdefault(title, [])
        with errors.status(f"measuring: {name}"):
            for figure in run():
                rows.append(figure)
                if asked.json:
                    asked.json.write_text(_as_json(tables))
        show(title, rows, out)
    figures = [figure for table in tables.values() for figure in table]
    out.print(summary(figures), highlight=False)
    print(machine())
    if asked.write:
        hardware = gpus_named() if set(asked.parts) <= set(GPU_PARTS) else cpu()
        print(f"written: {write(tables, hardware).relative_to(ROOT)}")
    return int(asked.strict and any(figure.met is False for figure in figures))


if __name__ == "__main__":
    logging.getLogger("vcache").setLevel(logging.ERROR)  # servers are killed on purpose here
    sys.exit(main())
