"""Many views of a segment at once: the same memory as one by one, and none if one is impossible."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vcache.errors import RemoteProtocolError, SegmentError
from vcache.limits import MIB
from vcache.segment import DATA_OFFSET, Segment, allocate

SIZE = 1 * MIB


@pytest.fixture
def segment() -> Iterator[Segment]:
    with allocate("shm:0", SIZE) as made:
        yield made


def test_they_are_the_memory_itself(segment: Segment) -> None:
    places = [(DATA_OFFSET + 512, 8), (DATA_OFFSET, 16), (SIZE - 1, 1)]
    views = segment.views(places)
    assert [len(view) for view in views] == [8, 16, 1]
    for number, view in enumerate(views, 1):
        view.fill_(number)
    assert [segment.peek(*place) for place in places] == [b"\1" * 8, b"\2" * 16, b"\3"]


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (DATA_OFFSET - 1, 2), (DATA_OFFSET, 0), (DATA_OFFSET, -1), (SIZE - 4, 5)]
)
def test_one_outside_the_data_refuses_all(segment: Segment, offset: int, length: int) -> None:
    good = [(DATA_OFFSET, 64), (SIZE - 64, 64)]
    for places in ([(offset, length), *good], [*good, (offset, length)]):
        with pytest.raises(RemoteProtocolError, match="extent: got offset"):
            segment.views(places)


def test_none_of_memory_that_is_gone() -> None:
    with allocate("shm:0", SIZE) as segment:
        pass
    with pytest.raises(SegmentError, match="not mapped any more"):
        segment.views([(DATA_OFFSET, 8)])
