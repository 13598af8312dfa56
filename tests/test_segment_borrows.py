"""Borrows of a segment: its memory stays mapped until the last one ends, and then it goes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.segments import SIZE, mapped_here, mappings
from vcache.errors import SegmentError
from vcache.segment import DATA_OFFSET, MappedSegment, Segment, allocate


@pytest.fixture
def segment() -> Iterator[Segment]:
    with allocate("shm:0", SIZE) as made:
        yield made


def test_a_retired_segment_is_unmapped_when_the_last_borrow_ends(segment: Segment) -> None:
    before = mappings()
    mapped = mapped_here(segment)
    calls: list[int] = []
    first, second = mapped.borrow(), mapped.borrow()
    assert first is not None
    assert second is not None
    assert mapped.borrows == 2
    view = mapped.view(DATA_OFFSET, 8)
    mapped.retire(lambda: calls.append(1))
    assert mapped.borrow() is None, "no new borrow: a miss"
    first.release()
    first.release()
    assert (calls, mapped.gone, mappings()) == ([], False, before + 1)
    view.fill_(5)
    other = threading.Thread(target=second.release)
    other.start()
    other.join()
    assert (calls, mapped.gone, mappings()) == ([1], True, before)
    assert bytes(segment.view(DATA_OFFSET, 8).numpy()) == b"\5" * 8
    mapped.retire(lambda: calls.append(2))
    assert calls == [1, 2]
    with pytest.raises(SegmentError, match="not mapped any more"):
        mapped.view(DATA_OFFSET, 8)


def test_an_idle_segment_is_unmapped_at_once(segment: Segment) -> None:
    mapped = mapped_here(segment)
    before = mappings()
    calls: list[int] = []
    mapped.retire(lambda: calls.append(1))
    assert (calls, mapped.gone, mapped.borrow(), mappings()) == ([1], True, None, before - 1)


def test_a_view_that_is_kept_does_not_keep_the_mapping(segment: Segment) -> None:
    mapped = mapped_here(segment)
    view = mapped.view(DATA_OFFSET, 8)
    before = mappings()
    mapped.retire()
    assert mappings() == before - 1
    assert view.numel() == 8, "the tensor is there, what it points to is not"


def test_a_borrow_ends_with_its_block_also_by_an_error(segment: Segment) -> None:
    mapped = mapped_here(segment)

    def copy() -> None:
        borrow = mapped.borrow()
        assert borrow is not None
        with borrow:
            raise ValueError("a copy failed")

    with pytest.raises(ValueError, match="a copy failed"):
        copy()
    assert mapped.borrows == 0
    mapped.retire()
    assert mapped.gone


def test_what_a_callback_raises_does_not_reach_the_copy(
    segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    mapped = mapped_here(segment)
    borrow = mapped.borrow()
    assert borrow is not None

    def broken() -> None:
        raise ValueError("cannot acknowledge")

    calls: list[int] = []
    mapped.retire(broken)
    mapped.retire(lambda: calls.append(1))
    borrow.release()
    assert calls == [1]
    assert "cannot acknowledge" in caplog.text


def test_many_threads_borrow_while_it_is_retired(segment: Segment) -> None:
    mapped = mapped_here(segment)
    calls: list[int] = []
    ready = threading.Barrier(9)

    def copies() -> None:
        ready.wait(10)
        while (borrow := mapped.borrow()) is not None:
            with borrow:
                mapped.view(DATA_OFFSET, 64).fill_(1)

    threads = [threading.Thread(target=copies) for _ in range(8)]
    for thread in threads:
        thread.start()
    ready.wait(10)
    for _ in range(3):
        mapped.retire(lambda: calls.append(1))
    for thread in threads:
        thread.join(30)
    assert (calls, mapped.borrows, mapped.gone) == ([1, 1, 1], 0, True)


def test_closing_waits_for_running_copies() -> None:
    segment = allocate("shm:0", SIZE)
    borrow = segment.borrow()
    assert borrow is not None
    view = segment.view(DATA_OFFSET, 4)
    assert not segment.close()
    assert segment.borrow() is None
    assert segment.incarnation_now() == 0, "nobody counts a hit any more"
    view.fill_(1)
    with pytest.raises(SegmentError, match="is closed"):
        segment.descriptor()
    threading.Thread(target=borrow.release).start()
    assert segment.close(wait_s=30)
    assert segment.gone
    assert segment.close()


# -------------------------------------------------------------------------------- registered memory


class Registrar:
    """What plays the driver: remembers what is registered, and how many segments were mapped at its end."""

    def __init__(self, error: str = "") -> None:
        self.asked: list[tuple[int, int]] = []
        self.mapped_at_the_end: list[int] = []
        self._error = error

    def __call__(self, address: int, size: int) -> Callable[[], None]:
        self.asked.append((address, size))
        if self._error:
            raise SegmentError(self._error)
        return lambda: self.mapped_at_the_end.append(mappings())


@pytest.mark.parametrize("held", [True, False], ids=["held here", "a peer's"])
def test_memory_is_registered_once_and_until_it_is_unmapped(segment: Segment, held: bool) -> None:
    memory: Segment | MappedSegment = segment if held else mapped_here(segment)
    registrar, before = Registrar(), mappings()
    for _ in range(2):
        memory.register(registrar)
    assert registrar.asked == [(memory.view(DATA_OFFSET, 1).data_ptr() - DATA_OFFSET, SIZE)]
    borrow = memory.borrow()
    assert borrow is not None
    if isinstance(memory, MappedSegment):
        memory.retire()
    else:
        memory.close()
    assert registrar.mapped_at_the_end == [] and mappings() == before
    borrow.release()
    assert registrar.mapped_at_the_end == [before] and mappings() == before - 1


def test_memory_that_cannot_be_registered_is_not_tried_again(segment: Segment) -> None:
    registrar = Registrar("no pages may be locked")
    for _ in range(2):
        with pytest.raises(SegmentError, match="no pages may be locked"):
            segment.register(registrar)
    assert len(registrar.asked) == 1
    assert segment.close()
