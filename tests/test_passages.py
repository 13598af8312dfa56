"""Chunks on their way up: what is forgotten meanwhile is not bound, whatever the order."""

from __future__ import annotations

import threading

from tests.processes.worker import DEADLINE_S
from vcache.engine.passages import Passage, Passages

ONE, TWO = b"1" * 32, b"2" * 32


def forgotten(passage: Passage) -> frozenset[bytes]:
    with passage.ending() as keys:
        return keys


def test_nothing_is_void_that_nobody_forgets() -> None:
    passages = Passages()
    with passages.closed([ONE]):
        pass
    with passages.opened([ONE, TWO]) as passage:
        assert passage.is_open(ONE) and forgotten(passage) == frozenset()


def test_what_is_forgotten_while_it_is_on_its_way_is_void() -> None:
    passages = Passages()
    with passages.opened([ONE, TWO]) as passage:
        with passages.closed([ONE]):
            assert forgotten(passage) == {ONE}
        assert forgotten(passage) == {ONE}
        assert passage.is_open(TWO) and not passage.is_open(ONE)
        with passages.closed(None):
            pass
        assert forgotten(passage) == {ONE, TWO}


def test_what_sets_out_while_it_is_being_forgotten_is_void() -> None:
    passages = Passages()
    with passages.closed(None), passages.closed([TWO]), passages.opened([ONE]) as passage:
        assert forgotten(passage) == {ONE}
    with passages.closed([TWO]), passages.closed(None):
        pass
    with passages.closed([TWO]), passages.opened([ONE, TWO]) as passage:
        assert forgotten(passage) == {TWO}


def test_who_forgets_waits_for_what_is_being_bound() -> None:
    passages, steps = Passages(), []
    forgetting = threading.Event()

    def forget() -> None:
        forgetting.set()
        with passages.closed(None):
            steps.append("forgotten")

    thread = threading.Thread(target=forget)
    with passages.opened([ONE]) as passage, passage.ending():
        thread.start()
        assert forgetting.wait(DEADLINE_S)
        steps.append("bound")
    thread.join(DEADLINE_S)
    assert steps == ["bound", "forgotten"]
