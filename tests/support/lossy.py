"""Between clients and the metadata server: a relay that loses, repeats and delays request frames, by a seed.

Clients use a runtime directory of their own, in which the session socket is a link to the real one and the
request socket is the relay's. A session's lock has a second name in the real directory: it is one file, so
the server finds it held by the very process that greets it.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import zmq

from vcache import protocol
from vcache.runtime import RuntimeDir

_LOOK_MS = 2
"""How often it looks for locks of new sessions and for frames whose delay is over."""


@dataclass(frozen=True)
class Fate:
    """What happens to frames: probabilities of being lost, repeated and delayed; delays up to `delay_s`."""

    lost: float = 0.0
    repeated: float = 0.0
    delayed: float = 0.0
    delay_s: float = 0.0


Drop = Callable[[bytes, bytes], bool]
"""Whether the frame of this client, an answer of the server's, is lost."""


class LossyRelay:
    """`with LossyRelay(pool.path, front, fate, seed):` clients with runtime_dir=front go through it."""

    def __init__(self, path: Path, front: Path, fate: Fate = Fate(), seed: int = 0) -> None:
        self.fate = fate
        self.drop_answer: Drop | None = None
        self.counts: Counter[str] = Counter()
        self._real = RuntimeDir.resolve(str(path))
        self._front = RuntimeDir.resolve(str(front))
        self._random = random.Random(seed)
        self._order = itertools.count()
        self._late: list[tuple[float, int, zmq.Socket[bytes], list[bytes]]] = []
        self._back: dict[bytes, zmq.Socket[bytes]] = {}
        self._client_of: dict[zmq.Socket[bytes], bytes] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lossy-relay")

    def __enter__(self) -> LossyRelay:
        self._front.session_path.symlink_to(self._real.session_path)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    # -- the relay's thread

    def _run(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        front = self._context.socket(zmq.ROUTER)
        front.bind(self._front.rpc_endpoint)
        self._poller.register(front, zmq.POLLIN)
        while not self._ended.is_set():
            for ready, _ in self._poller.poll(_LOOK_MS):
                if ready is front:
                    client, *frames = front.recv_multipart()
                    self._pass("requests", self._back_of(client), frames)
                else:
                    client = self._client_of[ready]
                    (frame,) = ready.recv_multipart()
                    if self.drop_answer is not None and self.drop_answer(client, frame):
                        self.counts["answers lost"] += 1
                        continue
                    self._pass("answers", front, [client, frame])
            while self._late and self._late[0][0] <= time.monotonic():
                _, _, to, frames = heapq.heappop(self._late)
                self._send(to, frames)
            self._give_locks_their_second_names()
        self._context.destroy(linger=0)

    def _back_of(self, client: bytes) -> zmq.Socket[bytes]:
        """A client's own socket at the server."""
        back = self._back.get(client)
        if back is None:
            back = self._back[client] = self._context.socket(zmq.DEALER)
            back.reconnect_ivl = 10
            back.connect(self._real.rpc_endpoint)
            self._client_of[back] = client
            self._poller.register(back, zmq.POLLIN)
        return back

    def _pass(self, kind: str, to: zmq.Socket[bytes], frames: list[bytes]) -> None:
        self.counts[kind] += 1
        if self._random.random() < self.fate.lost:
            self.counts[f"{kind} lost"] += 1
            return
        copies = 1
        if self._random.random() < self.fate.repeated:
            self.counts[f"{kind} repeated"] += 1
            copies = 2
        for _ in range(copies):
            if self._random.random() < self.fate.delayed:
                self.counts[f"{kind} delayed"] += 1
                due_s = time.monotonic() + self._random.uniform(0, self.fate.delay_s)
                heapq.heappush(self._late, (due_s, next(self._order), to, frames))
            else:
                self._send(to, frames)

    def _send(self, to: zmq.Socket[bytes], frames: list[bytes]) -> None:
        try:
            to.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:  # nobody is there: lost as well
            self.counts["lost for want of a reader"] += 1

    def _give_locks_their_second_names(self) -> None:
        for lock in self._front.sessions_dir.iterdir():
            second = self._real.sessions_dir / lock.name
            try:
                os.link(lock, second)
            except (FileExistsError, FileNotFoundError):  # it has one, or its session has just ended
                continue


def first_answers() -> Drop:
    """Drops the first answer to each request that grants or changes something, and no other frame."""
    seen: set[tuple[bytes, int]] = set()
    wanted = (protocol.Reserved, protocol.Committed, protocol.Acquired)

    def drop(client: bytes, frame: bytes) -> bool:
        answer = protocol.decode_answer(frame)
        is_first = (client, answer.rid) not in seen
        seen.add((client, answer.rid))
        return is_first and isinstance(protocol.decode_reply(answer.body), wanted)

    return drop
