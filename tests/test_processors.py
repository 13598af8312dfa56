"""How many processors are idle, and how many threads copy where none is."""

from __future__ import annotations

import os

import pytest
import torch

from vcache.kernels import threads
from vcache.kernels.threads import threads_for
from vcache.processors import idle_processors


def test_idle_processors_are_counted() -> None:
    assert idle_processors(0) < 0 < idle_processors(1 << 20)
    assert idle_processors() < len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("torchs", "idle", "nbytes", "wanted"),
    [
        (4, 2, 100, 4),
        (4, 2, 25, 2),
        (4, 2, 9, 0),
        (4, 0, 100, 3),
        (4, 0, 25, 2),
        (2, 0, 100, 1),
        (1, 0, 100, 1),
    ],
)
def test_busy_processors_leave_one_thread_out(
    torchs: int, idle: int, nbytes: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: torchs)
    monkeypatch.setattr(threads, "idle_processors", lambda count: idle)
    assert threads_for(nbytes, 10) == wanted
