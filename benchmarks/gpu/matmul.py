"""A matrix product on another stream: how much slower it gets while the pool stores and retrieves at full
speed.

Another thread stores and retrieves 8 chunks without a pause, on a stream of its own; the products are timed
by events on theirs. Once with all that a copy takes, and with bounds on the multiprocessors that it may use.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch

from benchmarks.gpu.device import own_stream, torch_device
from benchmarks.gpu.subject import Subject, counts_that_fit, own_segment
from benchmarks.report import Figure
from vcache.bench.clock import finish, recorded_event, seconds_between, seconds_on
from vcache.bench.copy import LLAMA3_8B
from vcache.kernels import LaunchOptions
from vcache.layout import KVLayout

TITLE: Final = "A matrix product (bf16) beside stores and retrieves on another stream"
ROUNDS: Final = 7
SIZE: Final = 8192
PRODUCTS: Final = 10
CHUNKS: Final = 8

_SHARES: Final = (1 / 4, 1 / 8, 1 / 16)
"""Of the multiprocessors: the bounds that are tried."""

_QUEUED_MAX: Final = 4
"""Copies launched ahead: enough that the stream never runs dry, and few to wait for at the end."""


def run(labels: Sequence[str]) -> Iterator[Figure]:
    """Measure on the first device."""
    return figures(labels[0], LLAMA3_8B, SIZE, ROUNDS)


def figures(label: str, layout: KVLayout, size: int, rounds: int) -> Iterator[Figure]:
    """The figures of a product of `size` × `size`, alone and beside copies under each bound."""
    device = torch_device(label)
    if not counts_that_fit(layout, label, [CHUNKS]):
        yield Figure("a matrix product beside copies", "left out: too little memory")
        return
    with own_segment(layout, CHUNKS, label) as subject:
        products = Products(size, device)
        alone = products.seconds(rounds)
        flops = 2 * size**3 / alone
        yield Figure(f"{size} × {size} alone", f"{alone * 1e3:.2f} ms, {flops / 1e12:,.0f} TFLOP/s")
        for limit in limits_of(device):
            with Copying(subject, LaunchOptions(sm_limit=limit)) as copying:
                undisturbed = copying.gbytes_per_s(products.seconds(1) * PRODUCTS)
            with Copying(subject, LaunchOptions(sm_limit=limit)) as copying:
                seconds, rate = copying.rate_during(lambda: products.seconds(rounds))
            what = f"at most {limit} multiprocessors" if limit else "no bound"
            yield Figure(
                f"copies with {what}", f"product {seconds / alone:.2f} × as long, copies {rate:,.0f} GB/s"
            )
            yield Figure(f"copies with {what}, beside nothing", f"{undisturbed:,.0f} GB/s")


def limits_of(device: torch.device) -> list[int]:
    """No bound first, then shares of the device's multiprocessors."""
    if device.type == "cpu":
        return [0, 1]
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return [0, *(max(1, round(count * share)) for share in _SHARES)]


class Products:
    """Matrix products on the current stream of the thread that asks."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._device = device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        shape = (size, size)
        self._left = torch.randn(shape, device=device, generator=generator, dtype=torch.float32).to(dtype)
        self._right = torch.randn(shape, device=device, generator=generator, dtype=torch.float32).to(dtype)
        self._product = torch.empty(shape, device=device, dtype=dtype)
        for _ in range(2):
            self._multiply()
        finish(device)

    def _multiply(self) -> None:
        torch.mm(self._left, self._right, out=self._product)

    def seconds(self, rounds: int) -> float:
        """Seconds of one, the median over rounds of PRODUCTS in a row."""
        if self._device.type == "cpu":
            return statistics.median(
                seconds_on(self._device, self._multiply, PRODUCTS) for _ in range(rounds)
            )
        times = []
        with own_stream(self._device):
            for _ in range(rounds):
                begin = recorded_event(timing=True)
                for _ in range(PRODUCTS):
                    self._multiply()
                end = recorded_event(timing=True)
                end.synchronize()  # this stream alone: the copies go on
                times.append(seconds_between(begin, end) / PRODUCTS)
        return statistics.median(times)


class Copying:
    """A thread that gathers and scatters in turns, without a pause, while the block runs."""

    def __init__(self, subject: Subject, options: LaunchOptions) -> None:
        self._subject = subject
        self._options = options
        self._told = threading.Event()
        self._going = threading.Event()
        self._done = 0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="copies", daemon=True)

    def __enter__(self) -> Copying:
        self._thread.start()
        self._going.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._told.set()
        self._thread.join()
        finish(self._subject.device)
        if self._failure is not None:
            raise self._failure

    def rate_during(self, measure: Callable[[], float]) -> tuple[float, float]:
        """What `measure()` gives, and the copies' GB/s meanwhile."""
        before, begin_s = self._done, time.perf_counter()
        value = measure()
        copies, seconds = self._done - before, time.perf_counter() - begin_s
        return value, copies * self._subject.bytes / seconds / 1e9

    def gbytes_per_s(self, for_s: float) -> float:
        """The copies' rate over so many seconds in which this thread does nothing."""
        _, rate = self.rate_during(lambda: float(self._told.wait(max(for_s, 0.2))))
        return rate

    def _run(self) -> None:
        try:
            with own_stream(self._subject.device):
                self._copy()
        except BaseException as error:
            self._failure = error
        finally:
            self._going.set()

    def _copy(self) -> None:
        is_gpu = self._subject.device.type == "cuda"
        queued: deque[torch.cuda.Event] = deque()
        while not self._told.is_set():
            for action in (self._subject.gather, self._subject.scatter):
                action(self._options)
                if is_gpu:
                    queued.append(recorded_event(blocking=True))
                    if len(queued) <= _QUEUED_MAX:
                        continue
                    queued.popleft().synchronize()
                self._done += 1
                self._going.set()
