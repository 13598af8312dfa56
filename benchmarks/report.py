"""What every benchmark prints: figures with their wanted bounds, and what they ran on."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vcache.limits import GIB

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
WIDTH_PIPED: Final = 100
MEDIAN_RANGE_SAYS: Final = (
    "in brackets: where the median lies with a probability of 95 % (of fewer than 6: all)"
)


@dataclass(frozen=True)
class Figure:
    """One measured figure. text: with its unit. wanted: the bound in words, empty where none is set; met:
    whether it holds.
    """

    name: str
    text: str
    wanted: str = ""
    met: bool | None = None

    @property
    def verdict(self) -> str:
        """As printed."""
        return "" if self.met is None else "met" if self.met else "MISSED"


def at_most(name: str, value: float, bound: float, unit: str) -> Figure:
    """A figure that is to be at most `bound`."""
    return Figure(name, f"{number(value)} {unit}", f"≤ {bound:,} {unit}", value <= bound)


def at_least(name: str, value: float, bound: float, unit: str) -> Figure:
    """A figure that is to be at least `bound`."""
    return Figure(name, f"{number(value)} {unit}", f"≥ {bound:,} {unit}", value >= bound)


def number(value: float) -> str:
    """A value with as many decimals as mean something."""
    return f"{value:,.0f}" if value >= 1_000 else f"{value:,.2f}"


def interleaved(contestants: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Each contestant's values over `rounds`, taken in turns: what else the machine does hits all of them
    alike.
    """
    values: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for taken, contestant in zip(values, contestants, strict=True):
            taken.append(contestant())
    return values


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def keep(console: Console, title: str, name: str) -> None:
    """Write what a recording console has printed into a file of the results, and say which."""
    path = result_path(cpu(), f"{name}-{commit()}")
    path.write_text(f"# {title}\n\n```\n{console.export_text()}```\n")
    print(path.relative_to(ROOT))


def median_range(values: Sequence[float]) -> tuple[float, float]:
    """Two of the values, between which the median of what they are drawn from lies with a probability of 95 %
    (all of them for fewer than 6 values, which say less).

    By order statistics: the median is beyond the k-th value from an end as rarely as n thrown coins show that
    side fewer than k times.
    """
    ordered, count = sorted(values), len(values)
    outside, left_out = 0.0, 0
    for rank in range(count // 2):
        outside += 2 * math.comb(count, rank) / 2**count
        if outside > 0.05:
            break
        left_out = rank
    return ordered[left_out], ordered[count - 1 - left_out]


def gbytes_per_s(nbytes: int, seconds: Sequence[float]) -> str:
    """A rate for people: bytes over the median."""
    rate = nbytes / statistics.median(seconds) / 1e9
    return f"{rate:,.0f} GB/s" if rate >= 100 else f"{rate:.2f} GB/s"


def cpu() -> str:
    """The CPU's model."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def gpus() -> str:
    """The GPUs' models, empty where there is none."""
    names = _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def gpus_named() -> str:
    """The first GPU's model without its maker, for a file's name; "gpu" if nobody says it."""
    names = _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return names[0].removeprefix("NVIDIA").strip() if names else "gpu"


def result_path(hardware: str, measured: str) -> Path:
    """The file that results of today are kept in, by what they were measured on and which commit it was."""
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    return RESULTS / f"{date.today()}-{slug}-{measured}.md"


def commit() -> str:
    """What was measured; "-dirty" if it is not exactly that commit."""
    return _said("git", "describe", "--always", "--dirty") or "unknown"


def _said(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def machine() -> str:
    """CPU, cores, memory, GPUs, kernel, Python, commit: what a figure means nothing without."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    parts = [
        str(date.today()),
        cpu(),
        f"{len(os.sched_getaffinity(0))} cores",
        f"{memory:.0f} GiB",
        gpus(),
        f"Linux {platform.release()}",
        f"Python {platform.python_version()}",
        f"commit {commit()}",
    ]
    return ", ".join(part for part in parts if part)


def summary(figures: Sequence[Figure]) -> str:
    """How many of the wanted bounds are met, and a line for each one that was missed."""
    bounds = [figure for figure in figures if figure.met is not None]
    missed = [figure for figure in bounds if not figure.met]
    lines = [f"{len(bounds) - len(missed)} of {len(bounds)} bounds met"]
    lines += [f"missed: {figure.name}: {figure.text}, wanted {figure.wanted}" for figure in missed]
    return "\n".join(lines)


def markdown(tables: Mapping[str, Sequence[Figure]]) -> str:
    """The tables, by title, as a file to keep."""
    figures = [figure for table in tables.values() for figure in table]
    load = os.getloadavg()[0]
    bounds = summary(figures).replace("\n", "  \n")  # Markdown's line breaks
    parts = [f"# Benchmark\n\n{machine()}; load {load:.1f} at the end\n\n{bounds}"]
    for title, rows in tables.items():
        lines = ["| figure | measured | wanted | |", "|---|---:|---:|---|"]
        lines += [f"| {row.name} | {row.text} | {row.wanted} | {row.verdict} |" for row in rows]
        parts.append(f"## {title}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def console() -> Console:
    """Where tables go: as wide as the terminal, and wide enough where there is none."""
    wide = Console()
    return wide if wide.is_terminal else Console(width=WIDTH_PIPED)


def show(title: str, figures: Sequence[Figure], console: Console) -> None:
    """Print the figures as a table."""
    table = _empty_table(title)
    for figure in figures:
        table.add_row(figure.name, figure.text, figure.wanted, figure.verdict)
    console.print(table)


def show_all(tables: Mapping[str, Sequence[Figure]], console: Console) -> None:
    """Print all tables as one, with a section for each."""
    table = _empty_table("")
    for title, figures in tables.items():
        table.add_row(Text(title, style="bold"))
        for figure in figures:
            table.add_row(Text(figure.name), Text(figure.text), figure.wanted, figure.verdict)
        table.add_section()
    console.print(table)


def _empty_table(title: str) -> Table:
    table = Table(title=title or None, title_justify="left")
    for heading in ("figure", "measured", "wanted", ""):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    return table


def main(title: str, run: Callable[[], list[Figure]]) -> None:
    """Measure one part, and print its table and what it ran on."""
    show(title, run(), console())
    print(machine())
