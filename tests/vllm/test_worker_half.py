"""A worker's half: when its copies begin, and what becomes of those that fail."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from integration.vllm import worker as worker_module
from integration.vllm.done import Work
from integration.vllm.messages import Load, LoadPart, Orders, Save, SavePart
from tests.vllm.halves import PLACE, Lane

LOAD = Load(1, "one", False, 1, {PLACE: (LoadPart(0, (2, 3), (5, 6), b"extents"),)})
SAVE = Save(1, (SavePart(0, {PLACE: (b"k" * 16,)}, (7,)),))


def test_copies_wait_for_what_the_model_had_queued(working: Any) -> None:
    worker = working()
    worker.start_loads(Orders(loads=[LOAD]))
    worker.start_saves(Orders(saves=[SAVE]))
    worker.close()
    assert [transfer.after for transfer in worker.transfers] == worker.lane.events
    assert len(worker.lane.events) == 2


def test_a_failure_layer_by_layer_is_heard_with_its_step(working: Any) -> None:
    worker = working(layerwise=True)
    worker.held.clear()
    worker.start_loads(Orders(loads=[LOAD]))
    asked = ThreadPoolExecutor(1).submit(worker.results)  # before wait_for_save, as with a speculator
    worker.held.set()
    asked.result(30)
    assert worker.bad_blocks() == {5, 6}
    assert worker.report().failed == {1: 2}


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("ended", [True, False])
def test_a_load_that_cannot_begin_has_failed_and_nobody_waits(
    working: Any, layerwise: bool, ended: bool
) -> None:
    worker = working(layerwise=layerwise, lane=Lane(None if ended else RuntimeError("no event")))
    if ended:
        worker.close()
    worker.start_loads(Orders(loads=[LOAD]))
    worker.wait_for_layer("first")
    worker.wait_for_layer("second")
    worker.start_saves(Orders(saves=[SAVE]))
    worker.results()
    assert worker.bad_blocks() == {5, 6}
    report = worker.report()
    assert report.loads == {1: 1} and report.failed == {1: 2}
    assert report.saves == {1: 1} and report.stored[1] == 0
    assert worker._done.running(Work.LOAD) == worker._done.running(Work.SAVE) == 0


def test_saves_of_a_step_that_vllm_does_not_end_here_begin_with_the_next(working: Any) -> None:
    worker = working()
    worker.start_loads(Orders(saves=[SAVE]))
    worker.results()
    assert not worker.report() and not worker.transfers
    worker.start_loads(Orders())
    worker.start_saves(Orders())
    worker.close()
    worker.results()
    assert worker.report().saves == {1: 1} and len(worker.transfers) == 1


def test_saves_begin_once(working: Any) -> None:
    worker, orders = working(), Orders(saves=[SAVE])
    worker.start_loads(orders)
    worker.start_saves(orders)
    worker.start_loads(Orders())
    worker.close()
    worker.results()
    assert worker.report().saves == {1: 1} and len(worker.transfers) == 1
    assert worker._done.running(Work.SAVE) == 0


def test_segments_are_mapped_again_at_times(working: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def mapped(again_s: float) -> int:
        monkeypatch.setattr(worker_module, "_MAP_AGAIN_S", again_s)
        worker, calls = working(), []
        worker._client = SimpleNamespace(epoch=3, map_segments=lambda: calls.append(1), close=lambda: None)
        worker.start_loads(Orders())
        worker.start_loads(Orders())
        worker.close()
        return len(calls)

    assert mapped(0.0) == 2
    assert mapped(3600.0) == 1
