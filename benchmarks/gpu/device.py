"""The devices that are measured: which there are, their memory, streams; on a CPU there are none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from vcache.room import memory_room
from vcache.segment import parse_device

_MEMORY_SHARE: Final = 0.8
"""Of what is free: a GPU's allocator and its contexts need some of it."""


class NoGPU(RuntimeError):
    """There is none that can be used, and the message says why."""


def gpus() -> list[str]:
    """The GPUs that torch sees: "cuda:0" and so on. Raises NoGPU, in words, where there is none."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch {torch.__version__} is a build without CUDA" if built is None else "torch sees none"
        raise NoGPU(f"no GPU here: {why}")
    return [f"cuda:{ordinal}" for ordinal in range(torch.cuda.device_count())]


def torch_device(label: str) -> torch.device:
    """Where the tensors of a segment's device are: "shm:1" is the CPU's memory."""
    kind, ordinal = parse_device(label)
    return torch.device("cuda", ordinal) if kind == "cuda" else torch.device("cpu")


def spendable_bytes(label: str) -> int:
    """Memory of that device that a measurement may take."""
    device = torch_device(label)
    if device.type == "cpu":
        return memory_room().spendable
    give_back_cache(device)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * _MEMORY_SHARE)


def give_back_cache(device: torch.device) -> None:
    """Have torch give back what it keeps for later: segments are allocated by others."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """What the block launches goes to a stream of its own."""
    if device.type == "cpu":
        yield
        return
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
