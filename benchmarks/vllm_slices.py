"""Several vLLM servers compute at once, a tenth of a second each in turns, and time is counted in which each
could run: what else the machine does, which may change from one second to the next, hits all alike.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from benchmarks.vllm_servers import Folder
from demo.vllm_client import complete

SLICE_S = 0.1

Span = tuple[float, float]
"""From and until, of one clock."""


class _Asked:
    """A server that is asked for a token. at_s: when the first one came, once it is done."""

    def __init__(self, port: int, prompt: list[int]) -> None:
        self.slices: list[Span] = []
        self.done = threading.Event()
        self.at_s = 0.0
        self.error: BaseException | None = None
        self._port, self._prompt = port, prompt
        threading.Thread(target=self._ask, daemon=True).start()

    def _ask(self) -> None:
        try:
            asked_s = time.perf_counter()
            self.at_s = asked_s + complete(self._port, self._prompt, max_tokens=1).ttft_s
        except BaseException as error:  # raised again by who waits
            self.error = error
        finally:
            self.done.set()


def ttft_in_slices(where: Folder, ports: Sequence[int], prompt: list[int]) -> list[float]:
    """Seconds to the first token of each server, of the time in which it could run; all are stopped after.
    Raises as `complete`.
    """
    where.stop_all()
    asked = {port: _Asked(port, prompt) for port in ports}
    while not all(each.done.is_set() for each in asked.values()):
        for port, each in asked.items():
            if each.done.is_set():
                continue
            began_s = time.perf_counter()
            where.only(port)
            each.done.wait(SLICE_S)
            where.stop_all()
            each.slices.append((began_s, time.perf_counter()))
    for each in asked.values():
        if each.error is not None:
            raise each.error
    return [seconds_until(each.at_s, each.slices) for each in asked.values()]


def seconds_until(at_s: float, slices: Sequence[Span]) -> float:
    """How much of the slices is before a time."""
    return sum(min(end_s, at_s) - began_s for began_s, end_s in slices if began_s < at_s)
