"""LMCacheEngine on VCache beside LMCache's own backends: `python -m benchmarks.lmcache_backends`.

Needs LMCache (`make test-lmcache` makes environments that have it). On VCache one process stores and another
one loads, out of a holder's segment; LMCache's own backends store and load in one process, LocalCPUBackend
without leaving its memory: the limit. 8 chunks of 32 MiB. All take turns, so that what else the machine does
hits them alike; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks.processes import Pool
from benchmarks.report import ROOT, Figure, at_least, console, gbytes_per_s, machine, number, show
from integration.lmcache.bench.worker import BYTES, CHUNKS, TOKENS
from vcache.bench.echo import echo
from vcache.limits import MIB

TITLE: Final = f"LMCacheEngine, {CHUNKS} chunks of {BYTES // CHUNKS // MIB} MiB, host memory"
ROUNDS: Final = 7
LOOKUPS: Final = 200
LIMIT: Final = "LocalCPUBackend, own process"
OURS: Final = {
    "VCache primary": {"local_cpu": False, "max_local_cpu_size": 0, "storage_plugins": ["LocalCPUBackend"]},
    "VCache beside": {"local_cpu": False, "max_local_cpu_size": 1, "storage_plugins": ["vcache"]},
    "VCache staged": {"local_cpu": True, "max_local_cpu_size": 1, "storage_plugins": ["vcache"]},
}


class Worker:
    """A process with an LMCacheEngine."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        path = folder / f"{name.replace(' ', '-')}.yaml"
        path.write_text(yaml.safe_dump({"chunk_size": TOKENS // CHUNKS, **config}))
        command = [sys.executable, "-m", "integration.lmcache.bench.worker", str(path)]
        self._log = (folder / f"{path.stem}.log").open("wb")
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.answer()

    def answer(self) -> dict[str, Any]:
        """Its next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended: {Path(self._log.name).read_text()[-2000:]}")
        return dict(json.loads(line))

    def do(self, what: str, tokens: int | None = None) -> float:
        """Have it done; seconds. RuntimeError if it was not done with so many tokens."""
        assert self.process.stdin is not None
        print(json.dumps({"do": what}), file=self.process.stdin, flush=True)
        answer = self.answer()
        if tokens is not None and answer["tokens"] != tokens:
            raise RuntimeError(f"{what}: {answer['tokens']} tokens, wanted {tokens}")
        return float(answer["seconds"])

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self._log.close()


class Contestant:
    """Who stores, and who loads: perhaps the same."""

    def __init__(self, name: str, writer: Worker, reader: Worker) -> None:
        self.name = name
        self.writer = writer
        self.reader = reader
        self.stores: list[float] = []
        self.retrieves: list[float] = []
        self.lookups: list[float] = []

    def round(self) -> None:
        """Store, look up and load once."""
        self.stores.append(self.writer.do("store", TOKENS))
        if self.name != LIMIT:
            self.reader.do("forget_hot")
        self.lookups.append(
            statistics.median(self.reader.do("lookup", TOKENS) for _ in range(LOOKUPS // ROUNDS))
        )
        self.retrieves.append(self.reader.do("retrieve", TOKENS))
        self.reader.do("forget_hot")
        self.writer.do("clear")


def run() -> Iterator[Figure]:
    """The figures. RuntimeError where LMCache is not installed."""
    if find_spec("lmcache") is None:
        raise RuntimeError("LMCache is not installed here: use an environment of `make test-lmcache`")
    with ExitStack() as ending:
        pool = ending.enter_context(Pool())
        pool.start_server()
        pool.start_holder("shm:1", 4 * BYTES)
        contestants = list(_contestants(pool, ending))
        for contestant in contestants:
            contestant.round()  # maps, populates, imports
            for figures in (contestant.stores, contestant.retrieves, contestant.lookups):
                figures.clear()
        for _ in range(ROUNDS):
            for contestant in contestants:
                contestant.round()
        bare = _bare_echo(pool)
    yield from _figures(contestants, bare)


def _contestants(pool: Pool, ending: ExitStack) -> Iterator[Contestant]:
    def worker(name: str, config: dict[str, Any]) -> Worker:
        made = Worker(pool.folder, name, config)
        ending.callback(made.end)
        return made

    for name, config in OURS.items():
        plugin = str(config["storage_plugins"][0])  # type: ignore[index]
        extra = {
            f"storage_plugin.{plugin}.module_path": "integration.lmcache_plugin",
            f"storage_plugin.{plugin}.class_name": "VCacheStorageBackend",
            "vcache.runtime_dir": str(pool.runtime),
            "vcache.server.autostart": False,
            "vcache.segment.size": 0,
        }
        given = {**config, "extra_config": extra}
        yield Contestant(name, worker(f"{name} writer", given), worker(f"{name} reader", given))
    own = worker("cpu", {"local_cpu": True, "max_local_cpu_size": 1})
    yield Contestant(LIMIT, own, own)
    disk = {"local_disk": f"file://{pool.folder}/disk", "max_local_disk_size": 2}
    own = worker("disk", {"local_cpu": False, "max_local_cpu_size": 1, **disk})
    yield Contestant("LocalDiskBackend (on tmpfs), own process", own, own)
    if shutil.which("redis-server"):
        socket = 16399
        redis = subprocess.Popen(
            ["redis-server", "--port", str(socket), "--save", ""], stdout=subprocess.DEVNULL
        )
        ending.callback(redis.wait)
        ending.callback(redis.kill)
        remote = {"local_cpu": False, "max_local_cpu_size": 1, "remote_url": f"redis://127.0.0.1:{socket}"}
        yield Contestant(
            "RemoteBackend to Redis", worker("redis writer", remote), worker("redis reader", remote)
        )


def _bare_echo(pool: Pool) -> float:
    """Seconds of an exchange of a frame as large as the request of a lookup."""
    import time

    with echo(pool.folder) as echoing:
        frame, taken = bytes(CHUNKS * 32 + 64), []
        for _ in range(LOOKUPS):
            begin = time.perf_counter()
            echoing.exchange(frame)
            taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def _figures(contestants: list[Contestant], bare: float) -> Iterator[Figure]:
    limit = next(each for each in contestants if each.name == LIMIT)
    for each in contestants:
        yield Figure(f"{each.name}: store", gbytes_per_s(BYTES, each.stores))
        yield Figure(f"{each.name}: retrieve", gbytes_per_s(BYTES, each.retrieves))
        yield Figure(f"{each.name}: lookup", f"{statistics.median(each.lookups) * 1e6:,.0f} µs")
    yield Figure("bare ZeroMQ echo", f"{bare * 1e6:,.0f} µs")
    ours = contestants[0]
    yield Figure("lookup primary over the echo", f"{number(statistics.median(ours.lookups) / bare)} ×")
    for what in ("stores", "retrieves"):
        pairs = zip(getattr(limit, what), getattr(ours, what), strict=True)
        share = statistics.median(theirs / mine for theirs, mine in pairs)
        yield at_least(f"{what[:-1]}: primary, another process, over {LIMIT}", share, 0.8, "×")
    others = [each for each in contestants if each is not limit and each.name not in OURS]
    for other in others:
        pairs = zip(other.retrieves, ours.retrieves, strict=True)
        share = statistics.median(theirs / mine for theirs, mine in pairs)
        yield at_least(f"retrieve: primary over {other.name}", share, 1, "×")
    if not shutil.which("redis-server"):
        yield Figure("RemoteBackend to Redis", "not measured: no redis-server here")
    yield Figure("RemoteBackend to Mooncake", "not measured: needs a Mooncake master")


def main() -> int:
    """Measure and print."""
    try:
        figures = list(run())
    except RuntimeError as error:
        print(f"python -m benchmarks.lmcache_backends: {error}", file=sys.stderr)
        return 2
    show(TITLE, figures, console())
    print(machine())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
