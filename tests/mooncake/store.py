"""A Mooncake Store of real processes: a master, holders that lend memory, tiers in this process."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from tests.processes.worker import DEADLINE_S, Worker, eventually
from vcache.config import MooncakeConfig
from vcache.errors import Unavailable
from vcache.tiers.mooncake.master import Master
from vcache.tiers.mooncake.tier import MooncakeTier

LAYOUT = b"L" * 16
SIZE = 1 << 20
MIB = 1 << 20


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def chunk(number: int, size: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def is_here(tier: MooncakeTier, number: int, size: int = SIZE, layout: bytes = LAYOUT) -> bool:
    """Whether the tier has it; that its bytes are right is asserted."""
    into = torch.zeros(size, dtype=torch.uint8)
    if tier.get(key(number), into, layout) is None:
        return False
    assert torch.equal(into, chunk(number, size))
    return True


def hold(child: Any, settings: dict[str, Any], environment: dict[str, str]) -> bool:
    """In a worker: lend memory to the store."""
    os.environ.update(environment)
    child.kept["tier"] = MooncakeTier(MooncakeConfig(**settings))
    return bool(child.kept["tier"].wait_ready(DEADLINE_S))


def put(child: Any, number: int) -> bool:
    """In a worker that holds."""
    return bool(child.kept["tier"].put(key(number), chunk(number), LAYOUT))


def get(child: Any, number: int) -> bool:
    """In a worker that holds."""
    return is_here(child.kept["tier"], number)


def let_go(child: Any) -> None:
    """In a worker that holds: close the tier in order."""
    child.kept.pop("tier").close()


class Store:
    """`with Store() as store:` a master; holders and tiers as they are asked for."""

    def __init__(self, **master: Any) -> None:
        self.master = Master(**{"lease_s": 0.2, "options": ("--client_ttl=2",), **master})
        self.holders: list[Worker] = []
        self.tiers: list[MooncakeTier] = []

    def __enter__(self) -> Store:
        self.master.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for holder in self.holders:
            holder.kill()
        for tier in self.tiers:
            tier.close()
        self.master.kill()

    def settings(self, **given: Any) -> dict[str, Any]:
        return {"master": self.master.address, "metadata": self.master.metadata, "protocol": "tcp", **given}

    def tier(self, **given: Any) -> MooncakeTier:
        """A tier of this process; it lends nothing unless told."""
        made = MooncakeTier(MooncakeConfig(**self.settings(**given)))
        self.tiers.append(made)
        assert made.wait_ready(DEADLINE_S)
        return made

    def holder(self, lend: int = 64 * MIB, environment: dict[str, str] | None = None, **given: Any) -> Worker:
        """A process that lends memory to the store."""
        worker = Worker()
        self.holders.append(worker)
        assert worker.call("run", hold, self.settings(lend=lend, **given), environment or {})
        return worker


def works(tier: MooncakeTier, number: int) -> bool:
    """Whether a chunk can be put and read back now."""
    try:
        return tier.put(key(number), chunk(number), LAYOUT) and is_here(tier, number)
    except Unavailable:
        return False


def wait_until_works(tier: MooncakeTier, numbers: range) -> None:
    """Try one chunk after the other until one can be put and read back."""
    left = iter(numbers)
    eventually(lambda: works(tier, next(left)), "the store works again")


def offload_files(folder: Path) -> int:
    """Bytes that were offloaded there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
