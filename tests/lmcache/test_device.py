"""What waits for a GPU's copies, with a GPU that the test plays."""

from __future__ import annotations

from integration.lmcache.device import Device
from vcache.segment.pinning import register_with_cuda


class Played(Device):
    """A GPU that says when it was waited for."""

    def __init__(self, said: list[str]) -> None:
        super().__init__("cuda:1")
        self._said = said

    def synchronise(self) -> None:
        self._said.append("waited")


def test_on_a_cpu_nothing_waits() -> None:
    device, said = Device("cpu"), list[str]()
    device.after(lambda: said.append("done"))
    assert said == ["done"] and device.gpu is None and device.registrar is None
    device.turn()
    device.synchronise()
    assert said == ["done"]


def test_on_a_gpu_work_waits_for_all_that_was_launched_before() -> None:
    said: list[str] = []
    device = Played(said)
    assert device.gpu == 1 and device.registrar is register_with_cuda
    device.turn()
    assert said == [], "with nothing to do the GPU is not waited for"
    device.after(lambda: said.append("first"))
    device.after(lambda: said.append("second"))
    assert said == []
    device.turn()
    assert said == ["waited", "first", "second"]
    device.turn()
    assert len(said) == 3
