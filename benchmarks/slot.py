"""All that is shown on GPUs, in one go and bounded in time: `make gpu`, or `python -m benchmarks.slot`.

GPU tests, the process tests with their memory on a GPU, the benchmarks of `benchmarks.gpu`, and the kernels
under compute-sanitizer. A part that fails or hangs costs no other its time. The table comes last; it is
written to benchmarks/results/<date>-<GPU>-<commit>.md after every part, so that it is there if the machine is
taken away.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from benchmarks.gpu.device import NoGPU, gpus
from benchmarks.report import (
    ROOT,
    Figure,
    commit,
    console,
    gpus_named,
    machine,
    markdown,
    result_path,
    show_all,
    summary,
)

LOGS: Final = ROOT / "build" / "gpu"
PARTS_TITLE: Final = "Parts"

BUDGET_S: Final = 560.0
"""For all parts: a slot of ten minutes, less what the environment takes to be made."""

_END_S: Final = 10.0
"""For a part that was told to end: pytest then says how far it came."""

_CORES_PER_LANE: Final = 4
_LANES_MAX: Final = 4
"""Files of process tests at once: each has some processes that work, and all of them one GPU."""

_WITHOUT_KV: Final = {"test_trace_replay.py"}

_ACROSS_GPUS: Final = (
    "tests/processes/test_cross_gpu_store_retrieve.py",
    "tests/processes/test_holders.py",
    "tests/processes/test_readers_and_writers.py",
)
"""What may go otherwise where a segment and its readers are on different GPUs."""

_LMCACHE_TESTS: Final = "tests/gpu/test_lmcache.py"
_LMCACHE_NEEDS: Final = (
    "lmcache",
    "aiofile",
    "aiohttp",
    "numba",
    "opentelemetry",
    "prometheus_client",
    "transformers",
)
"""Of what it imports, what is missing most likely; looked for without importing it, which takes seconds."""

_NO_TESTS: Final = 5
"""pytest's exit code."""


@dataclass(frozen=True)
class Part:
    """One process of the run. limit_s: after that it is ended. has_figures: whether it writes some.

    device: where the process tests' memory is, as VCACHE_TEST_DEVICE.
    """

    name: str
    command: list[str]
    limit_s: float
    device: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    has_figures: bool = False

    @property
    def slug(self) -> str:
        """As part of a file's name."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)


@dataclass(frozen=True)
class Outcome:
    """How a part went. said: the last line of its output."""

    part: Part
    passed: bool
    said: str
    figures: dict[str, list[Figure]] = field(default_factory=dict)


def waves(count: int) -> list[list[Part]]:
    """The parts on `count` GPUs, in order; those of one wave run side by side."""
    python = sys.executable
    alone = [
        Part("doctor", [python, "-m", "vcache.cli", "doctor", "--start"], 90),
        Part(
            "GPU tests", [*_pytest(), "-m", "gpu", *_without_demo(), "--ignore", _LMCACHE_TESTS, "tests"], 150
        ),
        *_figures(["gpu-copies"], 120),
        *_figures(["gpu-retrieve", "gpu-lmcache", "gpu-host", "gpu-matmul", "gpu-pieces", "gpu-peers"], 75),
    ]
    if not _lmcache_lacks():
        tests = [*_pytest(), "-m", "gpu", _LMCACHE_TESTS]
        alone.insert(2, Part("LMCache's CUDA connector", tests, 120))
    made = [[part] for part in alone]
    made.append(list(_process_tests("cuda:0", _process_test_files())))
    if count > 1:
        made.append(list(_process_tests("cuda:0,cuda:1", [ROOT / file for file in _ACROSS_GPUS])))
    if shutil.which("compute-sanitizer"):
        made.append([_sanitizer()])
    return made


def left_out(count: int) -> list[str]:
    """What this machine cannot show, in words."""
    said = []
    if count == 1:
        said.append("one GPU: what needs several is left out (pairs of GPUs, process tests across them)")
    if lacks := _lmcache_lacks():
        said.append(f"without {', '.join(lacks)} LMCache's CUDA connector was not run over the pool")
    if not shutil.which("compute-sanitizer"):
        said.append("compute-sanitizer is not on the PATH: the kernels were not run under it")
    return said


def _lmcache_lacks() -> list[str]:
    return [name for name in _LMCACHE_NEEDS if find_spec(name) is None]


def _pytest() -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]


def _without_demo() -> list[str]:
    return [] if find_spec("transformers") else ["--ignore=tests/test_demo_model.py"]


def _figures(names: Sequence[str], limit_s: float) -> Iterator[Part]:
    for name in names:
        yield Part(name, [sys.executable, "-m", "benchmarks", name], limit_s, has_figures=True)


def _process_test_files() -> list[Path]:
    """All of them but those that move no KV."""
    files = sorted((ROOT / "tests" / "processes").glob("test_*.py"))
    return [file for file in files if file.name not in _WITHOUT_KV]


def _process_tests(device: str, files: Sequence[Path]) -> Iterator[Part]:
    for file in files:
        name = f"{file.stem.removeprefix('test_').replace('_', ' ')} on {device}"
        yield Part(name, [*_pytest(), str(file.relative_to(ROOT))], 240, device=device)


def _sanitizer() -> Part:
    """torch's own allocator would hide what reads or writes beyond an allocation."""
    options = ["--tool", "memcheck", "--error-exitcode", "99"]
    tests = [*_pytest(), "-m", "gpu", "-k", "kernel or gather or scatter", "tests/gpu", "--timeout", "0"]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Part("compute-sanitizer", ["compute-sanitizer", *options, *tests], 150, environment=environment)


def run_part(part: Part, limit_s: float) -> Outcome:
    """Run it to its end, or end it after `limit_s`."""
    log = LOGS / f"{part.slug}.log"
    figures = LOGS / f"{part.slug}.json"
    figures.unlink(missing_ok=True)
    command = [*part.command, "--json", str(figures)] if part.has_figures else part.command
    begin_s = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(part),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it started ends with it
        )
        stopped = not _ended(process, limit_s)
    seconds = time.monotonic() - begin_s
    found = _read_figures(figures)
    said = f"{sum(map(len, found.values()))} figures" if found and not process.returncode else _last_line(log)
    if stopped:
        said = f"ended after {seconds:.0f} s: {said}"
    elif process.returncode == _NO_TESTS and "pytest" in part.command:
        said = f"no such tests: {said}"
    passed = not stopped and process.returncode == 0
    return Outcome(part, passed, f"{said} ({seconds:.0f} s)", found)


def _ended(process: subprocess.Popen[bytes], limit_s: float) -> bool:
    """Whether it ended by itself; if not it and all that it started are gone now."""
    try:
        process.wait(limit_s)
        return True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment(part: Part) -> dict[str, str]:
    dropped = "VCACHE_", "TRITON_INTERPRET"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    device = {"VCACHE_TEST_DEVICE": part.device} if part.device else {}
    return {**kept, **device, **part.environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip("= ") if lines else "it said nothing"


def _read_figures(path: Path) -> dict[str, list[Figure]]:
    """What it wrote, complete or not."""
    with suppress(FileNotFoundError, json.JSONDecodeError):
        tables = json.loads(path.read_text())
        return {title: [Figure(**row) for row in rows] for title, rows in tables.items()}
    return {}


class Slot:
    """A run: what came out so far, and until when it may go on."""

    def __init__(self, budget_s: float, path: Path, notes: Sequence[str]) -> None:
        self._until_s = time.monotonic() + budget_s
        self.path = path
        self._notes = notes
        self.outcomes: list[Outcome] = []

    def run(self, parts: Sequence[Part]) -> None:
        """Run the parts of one wave, as many at once as the machine bears."""
        lanes = max(1, min(_LANES_MAX, len(parts), len(os.sched_getaffinity(0)) // _CORES_PER_LANE))
        with ThreadPoolExecutor(lanes) as pool:
            for outcome in pool.map(self._one, parts):
                self.outcomes.append(outcome)
                self.write()

    def _one(self, part: Part) -> Outcome:
        left_s = self._until_s - time.monotonic()
        if left_s <= 1:
            return Outcome(part, False, "no time was left")
        print(f"{part.name} …", flush=True)
        outcome = run_part(part, min(part.limit_s, left_s))
        print(f"{part.name}: {'passed' if outcome.passed else 'FAILED'}: {outcome.said}", flush=True)
        return outcome

    def tables(self) -> dict[str, list[Figure]]:
        """One for the parts, one for the figures of each."""
        rows = [Figure(each.part.name, each.said, "passes", each.passed) for each in self.outcomes]
        rows += [Figure("left out", note) for note in self._notes]
        made = {PARTS_TITLE: rows}
        for outcome in self.outcomes:
            made.update(outcome.figures)
        return made

    def write(self) -> None:
        """The file as of now."""
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(markdown(self.tables()), encoding="utf-8")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slot", description=__doc__)
    parser.add_argument(
        "--list", action="store_true", help="show the parts, their limits and commands; run none"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="with --list: as on a machine with N GPUs")
    parser.add_argument(
        "--only", metavar="TEXT", help="only the parts whose name contains TEXT, such as 'gpu-' or 'tests'"
    )
    parser.add_argument(
        "--budget-s", type=float, default=BUDGET_S, help=f"for all parts (default {BUDGET_S:.0f})"
    )
    parser.add_argument("--commit", default="", help="what is measured, where there is no git to ask")
    return parser.parse_args(argv)


def chosen(count: int, only: str | None) -> list[list[Part]]:
    """The waves that are asked for, without empty ones."""
    found = [[part for part in wave if only is None or only in part.name] for wave in waves(count)]
    return [wave for wave in found if wave]


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts and print the table; 0 if all passed and every bound was met, 2 without a GPU."""
    asked = arguments(argv)
    if asked.list:
        return _list(chosen(asked.gpus or 1, asked.only), left_out(asked.gpus or 1))
    try:
        count = len(gpus())
    except NoGPU as error:
        print(f"python -m benchmarks.slot: {error}", file=sys.stderr)
        return 2
    LOGS.mkdir(parents=True, exist_ok=True)
    notes = left_out(count)
    slot = Slot(asked.budget_s, result_path(gpus_named(), asked.commit or commit()), notes)
    for wave in chosen(count, asked.only):
        slot.run(wave)
    return _report(slot)


def _list(found: Sequence[Sequence[Part]], notes: Sequence[str]) -> int:
    for wave in found:
        for part in wave:
            print(f"{part.name}: at most {part.limit_s:.0f} s{', side by side' if len(wave) > 1 else ''}")
            print(f"    {' '.join(part.command)}")
    for note in notes:
        print(note)
    return 0


def _report(slot: Slot) -> int:
    tables = slot.tables()
    slot.write()
    failed = [outcome for outcome in slot.outcomes if not outcome.passed]
    for outcome in failed:
        print(f"\n--- {outcome.part.name}: the end of {LOGS / (outcome.part.slug + '.log')}")
        with suppress(FileNotFoundError):
            print(
                "\n".join((LOGS / f"{outcome.part.slug}.log").read_text(errors="replace").splitlines()[-15:])
            )
    show_all(tables, console())
    print(summary([figure for table in tables.values() for figure in table]))
    print(machine())
    print(f"written: {slot.path.relative_to(ROOT)}; logs: {LOGS.relative_to(ROOT)}")
    return int(bool(failed) or any(row.met is False for rows in tables.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
