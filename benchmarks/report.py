"""What every benchmark prints: figures with their wanted bounds, and what they ran on."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]


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


def machine() -> str:
    """CPU, cores, kernel, Python, commit: what a figure means nothing without."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    cores = len(os.sched_getaffinity(0))
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    return f"{date.today()}, {model}, {cores} cores, {system}, commit {git.stdout.strip() or 'unknown'}"


def show(title: str, figures: Sequence[Figure], console: Console) -> None:
    """Print the figures as a table."""
    table = Table(title=title, title_justify="left")
    for heading in ("figure", "measured", "wanted", ""):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for figure in figures:
        table.add_row(figure.name, figure.text, figure.wanted, figure.verdict)
    console.print(table)
