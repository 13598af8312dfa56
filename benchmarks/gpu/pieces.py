"""The copy engine beside the kernel, by the length of the contiguous pieces: which is faster from where on.

Pages of one layer, all of a size, in random order, gathered into one contiguous chunk: by one launch of the
kernel, and by one cudaMemcpyAsync per page. Measured as a caller waits for it, calls included, since it is
the calls that the copy engine is slow for. The crossover belongs into
`vcache.kernels.copy_engine.PIECE_BYTES_MIN`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

import torch

from benchmarks.gpu.device import torch_device
from benchmarks.report import Figure, gbytes_per_s, interleaved
from vcache.bench.clock import finish, seconds_until_done
from vcache.cli.present import size as shown_size
from vcache.kernels import PagedKV, gather_pages, prepare
from vcache.layout import KVLayout
from vcache.limits import KIB, MIB

TITLE: Final = "Copy engine beside kernel, by contiguous piece"
ROUNDS: Final = 9
PIECES: Final = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1 * MIB, 2 * MIB, 4 * MIB, 8 * MIB)

_BYTES: Final = 256 * MIB
_PIECES_MAX: Final = 4096
"""In one measurement: a call for each takes microseconds, and the rates are known long before."""


def run(labels: Sequence[str]) -> Iterator[Figure]:
    """Measure on the first device."""
    return figures(labels[0], PIECES, _BYTES, ROUNDS)


def figures(label: str, sizes: Sequence[int], nbytes: int, rounds: int) -> Iterator[Figure]:
    """The figures of each length of pieces, and where the copy engine becomes the faster one."""
    crossover = 0
    for piece in sizes:
        count = max(2, min(_PIECES_MAX, nbytes // piece))
        subject = Pieces(piece, count, torch_device(label))
        subject.verify()
        actions: list[Callable[[], None]] = [subject.by_kernel, subject.by_copy_engine]
        contestants = [partial(seconds_until_done, subject.device, action) for action in actions]
        by_kernel, by_engine = interleaved(contestants, rounds)
        is_faster = statistics.median(by_engine) < statistics.median(by_kernel)
        crossover = (crossover or piece) if is_faster else 0
        yield Figure(
            f"{count} pieces of {shown_size(piece)}",
            f"kernel {gbytes_per_s(count * piece, by_kernel)}, "
            f"copy engine {gbytes_per_s(count * piece, by_engine)}",
        )
    yield Figure(
        "the copy engine is faster from", shown_size(crossover) if crossover else "nowhere in this range"
    )


class Pieces:
    """`count` pages of `piece` bytes out of twice as many, in random order, and one chunk for them."""

    def __init__(self, piece: int, count: int, device: torch.device) -> None:
        layout = KVLayout(
            num_layers=1,
            num_kv_heads=1,
            head_size=1,
            dtype="uint8",
            kv_parts=1,
            chunk_tokens=count,
            form="pages",
            page_tokens=1,
            page_bytes=piece,
            page_format="benchmark axes=b",
        )
        self.device = device
        generator = torch.Generator(device).manual_seed(0)
        self.pages = torch.empty((2 * count, piece), dtype=torch.uint8, device=device)
        self.pages.random_(0, 256, generator=generator)
        self.paged = PagedKV.from_tensors([self.pages], "pb", layout)
        prepare(self.paged)
        self.ids = torch.randperm(2 * count, generator=torch.Generator().manual_seed(1))[:count]
        # On a GPU nobody looks how long the pieces are: so it is the kernel that runs.
        self._ids_there = self.ids.to(device)
        self.chunk = torch.zeros(count * piece, dtype=torch.uint8, device=device)
        self._moves = self._addresses(piece)

    def by_kernel(self) -> None:
        """All pieces in one launch."""
        if self.device.type == "cpu":
            gather_pages(self.paged, self.ids, [self.chunk])
            return
        from vcache.kernels import gpu

        gpu.gather(self.paged, self._ids_there, [self.chunk])

    def by_copy_engine(self) -> None:
        """One asynchronous memcpy for each piece, on the current stream."""
        if self.device.type == "cpu":
            for at, number in enumerate(self.ids.tolist()):
                length = self.pages.shape[1]
                self.chunk[at * length : (at + 1) * length].copy_(self.pages[number])
            return
        from cupy.cuda import runtime

        stream = torch.cuda.current_stream(self.device).cuda_stream
        copy, kind, length = runtime.memcpyAsync, runtime.memcpyDeviceToDevice, self.pages.shape[1]
        for to, source in self._moves:
            copy(to, source, length, kind, stream)

    def verify(self) -> None:
        """RuntimeError unless both ways bring the pages."""
        expected = self.pages[self._ids_there].flatten()
        for action in (self.by_kernel, self.by_copy_engine):
            self.chunk.zero_()
            action()
            finish(self.device)
            if not torch.equal(self.chunk, expected):
                raise RuntimeError(f"{action.__name__} brought other bytes than the pages have")

    def _addresses(self, piece: int) -> list[tuple[int, int]]:
        to, source = self.chunk.data_ptr(), self.pages.data_ptr()
        return [(to + at * piece, source + number * piece) for at, number in enumerate(self.ids.tolist())]
