"""Where LMCache's engine has its KV: a CPU, or a GPU whose copies go on after the calls that launch them."""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue

import torch

from vcache.segment.pinning import Registrar, register_with_cuda


class Device:
    """The engine's own device, by LMCache's name for it ("cuda:1", "cpu"). Thread-safe.

    gpu: its ordinal; None: a CPU. registrar: what host memory of the pool is made reachable with.
    """

    def __init__(self, name: str) -> None:
        device = torch.device(name)
        self.gpu: int | None = None
        if device.type == "cuda":
            self.gpu = torch.cuda.current_device() if device.index is None else device.index
        self.registrar: Registrar | None = None if self.gpu is None else register_with_cuda
        self._waiting: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def synchronise(self) -> None:
        """Wait until all that was launched is over: LMCache does not say on which streams it copies."""
        if self.gpu is not None:
            torch.cuda.synchronize(self.gpu)

    def after(self, work: Callable[[], None]) -> None:
        """Have `work` done when all that is launched by now is over: at once, or in `turn`."""
        if self.gpu is None:
            work()
        else:
            self._waiting.put(work)

    def turn(self) -> None:
        """Do what waits."""
        due = []
        while True:
            try:
                due.append(self._waiting.get_nowait())
            except Empty:
                break
        if due:
            self.synchronise()
        for work in due:
            work()
