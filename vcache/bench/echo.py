"""A bare ZeroMQ echo between two processes: what a request costs before anybody has done anything for it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import zmq

from vcache.errors import Unavailable

_ANSWER_MS: Final = 20_000
"""For the other process to start, and for one answer."""


class Echo:
    """A DEALER socket to a process that sends back what it gets."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket

    def exchange(self, frame: bytes) -> None:
        """Send a frame and wait until it is back."""
        self._socket.send(frame)
        self._socket.recv()


@contextmanager
def echo(folder: Path) -> Iterator[Echo]:
    """An echo over a socket in `folder`. Raises Unavailable if the other process does not start."""
    endpoint = f"ipc://{folder / 'echo.sock'}"
    process = subprocess.Popen([sys.executable, "-m", "vcache.bench.echo", endpoint], stdin=subprocess.PIPE)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.rcvtimeo = _ANSWER_MS
        socket.connect(endpoint)
        made = Echo(socket)
        try:
            made.exchange(b"there?")
            yield made
        except zmq.Again as error:
            raise Unavailable("the process that echoes did not answer") from error
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def serve(endpoint: str) -> None:
    """Send everything back to where it came from, until standard input ends.

    Another thread waits for that: a poll of both in this loop would make the echo slower than a bare one.
    """
    threading.Thread(target=_end_with_input, daemon=True).start()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(endpoint)
        while True:
            router.send_multipart(router.recv_multipart())


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)  # the other thread is in a receive that nothing ends


if __name__ == "__main__":
    serve(sys.argv[1])
