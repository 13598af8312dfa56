"""How near gather and scatter come to memcpy, in host memory or on a GPU: `python -m vcache.bench.copy`."""

from __future__ import annotations

import argparse
import ctypes
import gc
import mmap
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal

import msgspec
import torch
from torch import Tensor

from vcache.bench.clock import seconds_on
from vcache.errors import ArgumentError
from vcache.kernels import PagedKV, gather_tokens, prepare, scatter_tokens
from vcache.kernels.threads import spread
from vcache.layout import KVLayout

Order = Literal["pages", "random-pages", "random-slots"]
ORDERS: Final[tuple[Order, ...]] = ("pages", "random-pages", "random-slots")

TO_SEGMENT: Final = "memcpy to segment"
FROM_SEGMENT: Final = "memcpy from segment"

LLAMA3_8B: Final = KVLayout(num_layers=32, num_kv_heads=8, head_size=128, dtype="bfloat16", chunk_tokens=256)

AXES: Final = {"NHD": "kpshd", "NHD, K/V second": "pkshd", "HND": "kphsd", "K‖V interleaved": "phs(kd)"}


class CopyRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the result: medians over the rounds of one run.

    threads: 0 on a GPU. ratio: median of the rounds' ratios to a memcpy of the same bytes, by as many
        threads, in the same round and between the same kinds of memory; above 1 is faster than memcpy.
    """

    name: str
    order: str
    axes: str
    threads: int
    bytes: int
    seconds: float
    gbytes_per_s: float
    ratio: float


def shared_memory(size: int) -> Tensor:
    """`size` bytes of memory as a pool's segment has it: shared, mapped, every page there. A uint8 tensor."""
    mapping = mmap.mmap(-1, size)
    tensor = torch.frombuffer(mapping, dtype=torch.uint8)
    tensor.fill_(1)
    return tensor


def _gpu_memory(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, dtype=torch.uint8, device=device)


def memcpy(target: Tensor, source: Tensor, threads: int) -> None:
    """Copy bytes by libc's memcpy, one equal piece per thread; on a GPU by cudaMemcpyAsync."""
    if target.is_cuda:
        target.copy_(source, non_blocking=True)
        return
    piece = -(-len(source) // threads)

    def task(index: int) -> None:
        begin = index * piece
        length = min(piece, len(source) - begin)
        ctypes.memmove(target.data_ptr() + begin, source.data_ptr() + begin, max(length, 0))

    spread(task, threads, threads)


def slots_of(order: Order, pages: int, page_tokens: int, tokens: int) -> Tensor:
    """`tokens` different slots: of pages in ascending order, of shuffled pages, or shuffled one by one."""
    generator = torch.Generator().manual_seed(0)
    if order == "random-slots":
        return torch.randperm(pages * page_tokens, generator=generator)[:tokens]
    if order not in ORDERS:
        raise ArgumentError("order", repr(order), f"one of {', '.join(ORDERS)}")
    used = torch.arange(pages) if order == "pages" else torch.randperm(pages, generator=generator)
    return (used[:, None] * page_tokens + torch.arange(page_tokens)).flatten()[:tokens]


@dataclass
class _Bench:
    """The memory of one measurement; paged KV has twice the pages that the chunks need."""

    layout: KVLayout
    count: int
    axes: str
    page_tokens: int
    device: torch.device
    segment: Tensor = field(init=False)
    flat: Tensor = field(init=False)
    chunks: list[Tensor] = field(init=False)
    paged: PagedKV = field(init=False)

    def __post_init__(self) -> None:
        size = self.layout.chunk_bytes
        on_gpu = self.device.type == "cuda"
        length = size * self.count
        self.segment = _gpu_memory(length, self.device) if on_gpu else shared_memory(length)
        self.flat = torch.ones_like(self.segment)
        self.chunks = [self.segment[at : at + size] for at in range(0, len(self.segment), size)]
        tensors = [self._layer() for _ in range(self.layout.num_layers)]
        self.paged = PagedKV.from_tensors(tensors, self.axes, self.layout)
        prepare(self.paged)

    def _layer(self) -> Tensor:
        layout = self.layout
        pages = 2 * -(-layout.chunk_tokens * self.count // self.page_tokens)
        sizes = {
            "k": layout.kv_parts,
            "p": pages,
            "s": self.page_tokens,
            "h": layout.num_kv_heads,
            "d": layout.head_size,
        }
        if self.axes.endswith("(kd)"):
            shape = [sizes[axis] for axis in self.axes[:-4]] + [sizes["k"] * sizes["d"]]
        else:
            shape = [sizes[axis] for axis in self.axes]
        return torch.ones(shape, dtype=getattr(torch, layout.dtype), device=self.device)


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    layout: KVLayout = LLAMA3_8B,
    chunks: int = 8,
    orders: Sequence[Order] = ORDERS,
    threads: int = 0,
    *,
    axes: str = "kpshd",
    page_tokens: int = 16,
    rounds: int = 9,
    device: str = "cpu",
) -> list[CopyRow]:
    """Time gather and scatter of `chunks` chunks in each order beside memcpy in both directions, interleaved.

    `threads` 0 takes torch's number. device: "cpu" or a GPU ("cuda:0"), whose own time is taken then. Takes
    four times the chunks' bytes of its memory. Raises ArgumentError for an order that there is not.
    """
    on = torch.device(device)
    threads = 0 if on.type == "cuda" else threads or torch.get_num_threads()
    bench = _Bench(layout, chunks, axes, page_tokens, on)
    subjects: dict[tuple[str, str], Callable[[], None]] = {
        (TO_SEGMENT, ""): partial(memcpy, bench.segment, bench.flat, threads),
        (FROM_SEGMENT, ""): partial(memcpy, bench.flat, bench.segment, threads),
    }
    tokens = layout.chunk_tokens * chunks
    for order in orders:
        slots = slots_of(order, bench.paged.num_pages, page_tokens, tokens)
        subjects["gather", order] = partial(gather_tokens, bench.paged, slots, bench.chunks)
        subjects["scatter", order] = partial(scatter_tokens, bench.paged, slots, bench.chunks)
    with _threads(threads or torch.get_num_threads()):
        times = _interleaved(subjects, rounds, on)
    size, rows = layout.chunk_bytes * chunks, []
    for (name, shown_order), seconds in times.items():
        base = FROM_SEGMENT if name in ("scatter", FROM_SEGMENT) else TO_SEGMENT
        ratios = [beside / own for beside, own in zip(times[base, ""], seconds, strict=True)]
        middle = statistics.median(seconds)
        rows.append(
            CopyRow(
                name=name,
                order=shown_order,
                axes=axes,
                threads=threads,
                bytes=size,
                seconds=middle,
                gbytes_per_s=size / middle / 1e9,
                ratio=statistics.median(ratios),
            )
        )
    return rows


def _interleaved(
    subjects: dict[tuple[str, str], Callable[[], None]], rounds: int, device: torch.device
) -> dict[tuple[str, str], list[float]]:
    """Seconds per round of each subject, all subjects in every round, after one round that does not count."""
    times: dict[tuple[str, str], list[float]] = {name: [] for name in subjects}
    gc.collect()
    for number in range(rounds + 1):
        for name, subject in subjects.items():
            seconds = seconds_on(device, subject)
            if number:
                times[name].append(seconds)
    return times


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table for Llama-3-8B's layout; `--json` for programs."""
    parser = argparse.ArgumentParser(prog="python -m vcache.bench.copy", description=__doc__)
    parser.add_argument("--chunks", type=int, default=8, help="chunks of 32 MiB (default 8)")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's number")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument(
        "--axes", default="kpshd", help="one of " + ", ".join(f"{a} ({n})" for n, a in AXES.items())
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda:N")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    rows = measure(
        chunks=asked.chunks,
        threads=asked.threads,
        axes=asked.axes,
        page_tokens=asked.page_tokens,
        rounds=asked.rounds,
        device=asked.device,
    )
    if asked.json:
        sys.stdout.write(msgspec.json.encode(rows).decode() + "\n")
        return 0
    for row in rows:
        sys.stdout.write(
            f"{row.name:20} {row.order:13} {row.seconds * 1e3:8.1f} ms {row.gbytes_per_s:7.2f} GB/s"
            f" {row.ratio:6.2f} × memcpy\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
