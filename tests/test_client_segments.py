"""Waiting for the server to open a segment: once, and only for a server that answers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import pytest

from vcache.client.segments import Segments
from vcache.protocol import FromClient, Open, Opened, Unmapped

LINEAGE = 7
FOR_EVER_S = 3600.0
"""Longer than a test may take: a wait of that is a failure."""


class Server:
    """Takes what is posted and says nothing."""

    def __init__(self) -> None:
        self.posted: list[FromClient] = []
        self.answers = True
        self.asked = threading.Event()
        self.segments = Segments(self._post, "cpu", lambda: self.answers)
        self.segments.enter(LINEAGE)

    def _post(self, message: FromClient) -> bool:
        self.posted.append(message)
        self.asked.set()
        return True


def test_a_server_that_said_nothing_once_is_not_waited_for_again() -> None:
    server = Server()
    assert server.segments.get(1, LINEAGE, 0.0) is None
    assert server.segments.get(1, LINEAGE, FOR_EVER_S) is None
    assert server.posted == [Open(1, 1)]
    server.segments.opened(Opened(1, 1, b""), None)  # late: it is told that nobody maps it
    assert server.posted == [Open(1, 1), Unmapped(1)]


def test_a_server_that_does_not_answer_is_not_asked() -> None:
    server = Server()
    server.answers = False
    assert server.segments.get(1, LINEAGE, FOR_EVER_S) is None
    assert not server.posted


def test_a_wait_ends_when_the_server_stops_to_answer() -> None:
    server = Server()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(server.segments.get, 1, LINEAGE, FOR_EVER_S)
        assert server.asked.wait(30)
        server.answers = False
        server.segments.unanswered()
        assert waiting.result(30) is None
        assert server.segments.get(1, LINEAGE, FOR_EVER_S) is None


class Opening(Server):
    """Opens what it is asked for at once."""

    def _post(self, message: FromClient) -> bool:
        super()._post(message)
        if isinstance(message, Open):
            self.segments.opened(Opened(message.seq, message.segment, b""), None)
        return True


def test_who_is_interrupted_while_he_maps_a_segment_leaves_it_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(descriptor: bytes) -> NoReturn:
        raise KeyboardInterrupt

    server = Opening()
    with monkeypatch.context() as patched:
        patched.setattr("vcache.client.segments.decode_descriptor", interrupted)
        with pytest.raises(KeyboardInterrupt):
            server.segments.get(1, LINEAGE, FOR_EVER_S)
    assert server.posted == [Open(1, 1), Unmapped(1)]
    assert server.segments.get(1, LINEAGE, FOR_EVER_S) is None, "there is no such segment"
    assert server.posted == 2 * [Open(1, 1), Unmapped(1)], "but it was tried"
