"""Lower tiers beside their limits: the local one beside plain files, Mooncake's beside its own interface.

python -m benchmarks.tiers [DIRECTORY] [--only …] [--write]: the disk to measure on; /var/tmp by default.
--write keeps the figures in benchmarks/results/. With LMCache and Mooncake only where they are installed.
A ratio is the median of the rounds' ratios; a p99 is over all calls.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch

from benchmarks.lmcache_contestants import Worker
from benchmarks.report import (
    ROOT,
    Figure,
    at_least,
    commit,
    console,
    cpu,
    gbytes_per_s,
    interleaved,
    machine,
    markdown,
    ratio,
    result_path,
    show,
)
from benchmarks.tier_stores import stores
from integration.lmcache.bench.worker import BYTES, TOKENS
from vcache.errors import ConfigError
from vcache.limits import MIB
from vcache.locks import lock_holder
from vcache.tiers.base import Tier
from vcache.tiers.rocksdb.owner import LOCK
from vcache.tiers.rocksdb.tier import RocksTier

TITLE: Final = "Lower tiers"
SIZES: Final = (2 * MIB, 32 * MIB)
ROUND_BYTES: Final = 256 * MIB
ROUNDS: Final = 3
HOLDER_BYTES: Final = 2 << 30
WANTED: Final = 0.8
LAYOUT: Final = b"benchmark-layout"


def timed(action: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began_s = time.perf_counter()
    action()
    return time.perf_counter() - began_s


class Files:
    """Chunks as plain files: what the disk and the file system can do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, number: int, chunk: torch.Tensor) -> None:
        """Write and fsync one."""
        fd = os.open(self.folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            left = chunk.numpy().data
            while left:
                left = left[os.write(fd, left) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    def get(self, number: int, into: torch.Tensor) -> None:
        """Read one."""
        with (self.folder / str(number)).open("rb", buffering=0) as file:
            left = into.numpy().data
            while left:
                left = left[file.readinto(left) :]


def drop_caches(folder: Path) -> None:
    """Have the kernel forget what it has of the files in a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


@contextmanager
def rocks(folder: Path) -> Iterator[RocksTier]:
    """The local tier in a folder; its owner ends with the block."""
    tier = RocksTier(folder, capacity_bytes=16 << 30, deadline_s=120.0)
    try:
        if not tier.wait_ready():
            raise RuntimeError("the owner of the database does not answer")
        yield tier
    finally:
        tier.close()
        pid = lock_holder(folder / LOCK)
        if pid:
            os.kill(pid, signal.SIGKILL)


def key(number: int) -> bytes:
    """A chunk key."""
    return number.to_bytes(32, "big")


class Contestant:
    """Puts and gets of one tier or limit, a round at a time; remembers what each call took."""

    def __init__(self, put: Callable[[int], object], get: Callable[[int], object], count: int) -> None:
        self._put = put
        self._get = get
        self._count = count
        self._first = 0
        self.before: Callable[[], object] = int
        self.after_puts: Callable[[], object] = int
        self.calls: list[float] = []

    def put(self) -> float:
        """Put a round of new chunks; seconds."""
        self.before()
        first, self._first = self._first, self._first + self._count

        def all_of_them() -> None:
            for number in range(first, first + self._count):
                self._timed(self._put, number)
            self.after_puts()

        return timed(all_of_them)

    def get(self) -> float:
        """Get the chunks of the last round; seconds."""

        def all_of_them() -> None:
            for number in range(self._first - self._count, self._first):
                self._timed(self._get, number)

        return timed(all_of_them)

    def _timed(self, call: Callable[[int], object], number: int) -> None:
        self.calls.append(timed(lambda: call(number)))

    def p99_ms(self) -> str:
        """Of all calls since this was asked last."""
        calls, self.calls = sorted(self.calls), []
        return f"{calls[int(0.99 * (len(calls) - 1) + 0.5)] * 1e3:,.1f} ms"


def of_tier(tier: Tier, chunk: torch.Tensor, count: int) -> Contestant:
    """A tier's calls."""
    into = torch.empty_like(chunk)

    def put(number: int) -> None:
        if not tier.put(key(number), chunk, LAYOUT):
            raise RuntimeError(f"{tier.name} did not keep a chunk")

    def get(number: int) -> None:
        if tier.get(key(number), into, LAYOUT) is None:
            raise RuntimeError(f"{tier.name} has lost a chunk")

    return Contestant(put, get, count)


def local(folder: Path, size: int) -> list[Figure]:
    """Puts until they are on the disk, gets with and without page cache, beside plain files."""
    count = ROUND_BYTES // size
    chunk = torch.randint(0, 256, (size,), dtype=torch.uint8)
    into = torch.empty(size, dtype=torch.uint8)
    name = f"rocksdb, {size // MIB} MiB"
    files = Files(folder / "files")
    files.folder.mkdir()
    figures: list[Figure] = []
    with rocks(folder / "tier") as tier, ExitStack() as ending:
        ours = of_tier(tier, chunk, count)
        ours.after_puts = tier.sync
        theirs = Contestant(lambda n: files.put(n, chunk), lambda n: files.get(n, into), count)
        both = [ours, theirs]

        def cold(contestant: Contestant) -> Callable[[], float]:
            def run() -> float:
                drop_caches(folder)
                return contestant.get()

            return run

        puts = interleaved([each.put for each in both], ROUNDS)
        figures += _beside(f"{name}: put and sync", "files", puts, both)
        warm = interleaved([each.get for each in both], ROUNDS)
        figures += _beside(f"{name}: get, in the page cache", "files", warm, both)
        colds = interleaved([cold(each) for each in both], ROUNDS)
        figures += _beside(f"{name}: get, from the disk", "files", colds, both)
        figures += _beside_lmcache(name, folder, size, ours, ending)
        rate = ROUND_BYTES / statistics.median(puts[0])
        figures += stores(tier, size, rate / 2)
    return figures


def _beside_lmcache(
    name: str, folder: Path, size: int, ours: Contestant, ending: ExitStack
) -> Iterator[Figure]:
    """LMCache's LocalDiskBackend on the same disk; neither side waits for the disk after a put."""
    if find_spec("lmcache") is None:
        yield Figure(f"{name}, beside LocalDiskBackend", "not measured: LMCache is not installed here")
        return
    given = {"local_cpu": False, "max_local_cpu_size": 2, "max_local_disk_size": 8}
    disk = {"local_disk": f"file://{folder}/lmcache", "chunk_size": TOKENS * size // BYTES}
    worker = Worker(folder, "disk", {**given, **disk})
    ending.callback(worker.end)
    ours.after_puts = int

    def put() -> float:
        worker.do("clear", 0)
        return worker.do("store", 0, TOKENS)

    def drop(get: Callable[[], float]) -> Callable[[], float]:
        def run() -> float:
            drop_caches(folder)
            return get()

        return run

    def load() -> float:
        return worker.do("load_from_disk", 0, TOKENS)

    for _ in range(2):  # it imports and allocates
        put()
        load()
    yield from _beside(f"{name}: put", "LocalDiskBackend", interleaved([ours.put, put], ROUNDS), [ours])
    yield from _beside(
        f"{name}: get, in the page cache", "LocalDiskBackend", interleaved([ours.get, load], ROUNDS), [ours]
    )
    colds = interleaved([drop(ours.get), drop(load)], ROUNDS)
    yield from _beside(f"{name}: get, from the disk", "LocalDiskBackend", colds, [ours])


def mooncake(size: int) -> list[Figure]:
    """Puts and gets beside Mooncake's own calls on registered memory. A third client holds all the data: what
    lies with one of the two would be a memcpy for that one.
    """
    from mooncake.store import MooncakeDistributedStore

    from vcache.config import MooncakeConfig
    from vcache.tiers.mooncake.master import Master
    from vcache.tiers.mooncake.tier import MooncakeTier

    count = ROUND_BYTES // size
    chunk = torch.randint(0, 256, (size,), dtype=torch.uint8)
    into = torch.empty(size, dtype=torch.uint8)
    with Master() as master:
        tier = MooncakeTier(MooncakeConfig(master=master.address, protocol="tcp", lend=0))
        raw, holder = MooncakeDistributedStore(), MooncakeDistributedStore()
        try:
            for client, lent in ((holder, HOLDER_BYTES), (raw, 0)):
                if client.setup("127.0.0.1", "P2PHANDSHAKE", lent, 16 * MIB, "tcp", "", master.address):
                    raise RuntimeError("Mooncake does not answer")
            if not tier.wait_ready(30.0):
                raise RuntimeError("Mooncake does not answer")
            for memory in (chunk, into):
                raw.register_buffer(memory.data_ptr(), size)
            ours = of_tier(tier, chunk, count)
            ours.before = tier.clear
            theirs = Contestant(
                lambda n: raw.batch_put_from([f"raw{n}"], [chunk.data_ptr()], [size]),
                lambda n: raw.batch_get_into([f"raw{n}"], [into.data_ptr()], [size]),
                count,
            )
            theirs.before = lambda: raw.remove_by_regex("^raw.*", True)
            both = [ours, theirs]
            name = f"mooncake, {size // MIB} MiB"
            puts = interleaved([each.put for each in both], ROUNDS)
            figures = list(_beside(f"{name}: put", "its own calls", puts, both))
            gets = interleaved([each.get for each in both], ROUNDS)
            figures += _beside(f"{name}: get", "its own calls", gets, both)
        finally:
            tier.close()
            raw.close()
            holder.close()
    return figures


def _beside(
    name: str, limit: str, seconds: list[list[float]], contestants: list[Contestant]
) -> Iterator[Figure]:
    ours, theirs = seconds
    rates = f"{gbytes_per_s(ROUND_BYTES, ours)} / {gbytes_per_s(ROUND_BYTES, theirs)}"
    yield Figure(f"{name}, and {limit}", rates)
    yield Figure(f"{name}, p99 of a call", " / ".join(each.p99_ms() for each in contestants))
    yield at_least(f"{name}, beside {limit}", ratio(theirs, ours), WANTED, "×")


def run(disk: str, only: str | None) -> list[Figure]:
    """The figures of both tiers, or only of one; Mooncake's where it is installed."""
    figures: list[Figure] = []
    for size in SIZES if only != "mooncake" else ():
        folder = Path(tempfile.mkdtemp(prefix="vcache-bench-", dir=disk))
        try:
            figures += local(folder, size)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    try:
        for size in SIZES if only != "local" else ():
            figures += mooncake(size)
    except (ImportError, ConfigError) as error:
        figures.append(Figure("mooncake", f"not measured: {error}"))
    return figures


def command(arguments: Sequence[str]) -> None:
    """Measure, print, and keep the figures if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiers")
    parser.add_argument("directory", nargs="?", default="/var/tmp", help="on the disk to measure")
    parser.add_argument("--only", choices=("local", "mooncake"), help="one of the tiers")
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/")
    options = parser.parse_args(arguments)
    figures = run(options.directory, options.only)
    show(TITLE, figures, console())
    print(machine())
    if options.write:
        path = result_path(cpu(), f"tiers-{commit()}")
        path.write_text(markdown({TITLE: figures}))
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    command(sys.argv[1:])
