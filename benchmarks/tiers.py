"""Lower tiers beside their limits: the local one beside plain files, Mooncake's beside its own interface.

python -m benchmarks.tiers [DIRECTORY]: the disk to measure on; /var/tmp by default.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.report import Figure, at_least, gbytes_per_s, interleaved, main, ratio
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


def local(folder: Path, size: int) -> list[Figure]:
    """Puts until they are on the disk, gets with and without page cache, beside plain files."""
    count = ROUND_BYTES // size
    chunk = torch.randint(0, 256, (size,), dtype=torch.uint8)
    into = torch.empty(size, dtype=torch.uint8)
    files = Files(folder / "files")
    files.folder.mkdir()
    done = [0]

    with rocks(folder / "tier") as tier:

        def put_tier() -> float:
            first, done[0] = done[0], done[0] + count
            numbers = range(first, first + count)

            def put() -> None:
                _put_all(tier, numbers, chunk)
                tier.sync()

            return timed(put)

        def put_files() -> float:
            return timed(lambda: [*map(files.put, range(count), [chunk] * count)])

        def get_tier() -> float:
            return timed(lambda: _get_all(tier, range(count), into))

        def get_files() -> float:
            return timed(lambda: [*map(files.get, range(count), [into] * count)])

        def cold(get: Callable[[], float]) -> Callable[[], float]:
            def run() -> float:
                drop_caches(folder)
                return get()

            return run

        puts = interleaved([put_tier, put_files], ROUNDS)
        warm = interleaved([get_tier, get_files], ROUNDS)
        colds = interleaved([cold(get_tier), cold(get_files)], ROUNDS)
    name = f"rocksdb, {size // MIB} MiB"
    return [
        *_beside(f"{name}: put and sync", "files", puts),
        *_beside(f"{name}: get, in the page cache", "files", warm),
        *_beside(f"{name}: get, from the disk", "files", colds),
    ]


def mooncake(size: int) -> list[Figure]:
    """Puts and gets beside Mooncake's own calls on registered memory, in one process."""
    from mooncake.store import MooncakeDistributedStore

    from vcache.config import MooncakeConfig
    from vcache.tiers.mooncake.master import Master
    from vcache.tiers.mooncake.tier import MooncakeTier

    count = ROUND_BYTES // size
    chunk = torch.randint(0, 256, (size,), dtype=torch.uint8)
    into = torch.empty(size, dtype=torch.uint8)
    with Master() as master:
        tier = MooncakeTier(MooncakeConfig(master=master.address, protocol="tcp", lend=1 << 30))
        raw: Any = MooncakeDistributedStore()
        try:
            if not tier.wait_ready(30.0) or raw.setup(
                "127.0.0.1", "P2PHANDSHAKE", 1 << 30, 16 * MIB, "tcp", "", master.address
            ):
                raise RuntimeError("Mooncake does not answer")
            for memory in (chunk, into):
                raw.register_buffer(memory.data_ptr(), size)
            done = [0]

            def put_raw() -> float:
                raw.remove_by_regex("^raw.*", True)
                done[0] += 1
                names = [f"raw{done[0]}-{number}" for number in range(count)]
                return timed(lambda: [raw.batch_put_from([n], [chunk.data_ptr()], [size]) for n in names])

            def get_raw() -> float:
                names = [f"raw{done[0]}-{number}" for number in range(count)]
                return timed(lambda: [raw.batch_get_into([n], [into.data_ptr()], [size]) for n in names])

            def put_tier() -> float:
                tier.clear()
                return timed(lambda: _put_all(tier, range(count), chunk))

            def get_tier() -> float:
                return timed(lambda: _get_all(tier, range(count), into))

            puts = interleaved([put_tier, put_raw], ROUNDS)
            gets = interleaved([get_tier, get_raw], ROUNDS)
        finally:
            tier.close()
            raw.close()
    name = f"mooncake, {size // MIB} MiB"
    return [*_beside(f"{name}: put", "its own calls", puts), *_beside(f"{name}: get", "its own calls", gets)]


def _put_all(tier: Tier, numbers: range, chunk: torch.Tensor) -> None:
    for number in numbers:
        if not tier.put(key(number), chunk, LAYOUT):
            raise RuntimeError(f"{tier.name} did not keep a chunk")


def _get_all(tier: Tier, numbers: range, into: torch.Tensor) -> None:
    for number in numbers:
        if tier.get(key(number), into, LAYOUT) is None:
            raise RuntimeError(f"{tier.name} has lost a chunk")


def _beside(name: str, limit: str, seconds: list[list[float]]) -> Iterator[Figure]:
    ours, theirs = seconds
    rates = f"{gbytes_per_s(ROUND_BYTES, ours)} / {gbytes_per_s(ROUND_BYTES, theirs)}"
    yield Figure(f"{name}, and {limit}", rates)
    yield at_least(f"{name}, beside {limit}", ratio(theirs, ours), WANTED, "×")


def run(disk: str = "/var/tmp") -> list[Figure]:
    """All figures; Mooncake's only where it is installed."""
    figures: list[Figure] = []
    for size in SIZES:
        folder = Path(tempfile.mkdtemp(prefix="vcache-bench-", dir=disk))
        try:
            figures += local(folder, size)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    try:
        for size in SIZES:
            figures += mooncake(size)
    except (ImportError, ConfigError) as error:
        figures.append(Figure("mooncake", f"not measured: {error}"))
    return figures


if __name__ == "__main__":
    main(TITLE, lambda: run(*sys.argv[1:2]))
