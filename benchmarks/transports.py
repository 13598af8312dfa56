"""Chunks given to another process by a socket, by Redis and by the pool: `python -m benchmarks.transports`.

In each way a peer process has 8 chunks of 32 MiB in its memory and this one ends with them in its paged KV,
page-ordered: through a ZeroMQ socket (the peer sends its memory with copy=False, the frames are scattered
from where they arrived), through a private Redis on a Unix socket, without persistence (`redis-server`, where
it is installed; the time to set the values is not counted), and from the pool, where the peer's segment is
scattered in place. All scatter by the same kernel and take turns.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import zmq
from torch import Tensor

from benchmarks.engine import connected_engine, rate, timed
from benchmarks.paged import BYTES, CHUNKS, LAYOUT, PAGES, Paged, peer_pool
from benchmarks.processes import DEADLINE_S, Pool
from benchmarks.report import Figure, interleaved, ratio
from vcache.kernels import PagedKV, scatter_tokens
from vcache.limits import MIB

TITLE: Final = f"{CHUNKS} chunks of {LAYOUT.chunk_bytes // MIB} MiB from another process into paged KV"
ROUNDS: Final = 9

Arrival = Callable[[], None]
"""Fetches all chunks from where they are and scatters them into the paged KV."""


def arrive(paged: Paged, chunks: list[Tensor]) -> None:
    """Scatter chunks that were received."""
    scatter_tokens(PagedKV.from_tensors(paged.kvcaches, "kpshd", LAYOUT), paged.slots["pages"], chunks)


def serve(endpoint: str) -> None:
    """The peer of the ZeroMQ way: send the chunks, each as one frame, to whoever asks."""
    memory = torch.ones(BYTES, dtype=torch.uint8).numpy().data
    frames = [memory[at : at + LAYOUT.chunk_bytes] for at in range(0, BYTES, LAYOUT.chunk_bytes)]
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.bind(endpoint)
        while True:
            socket.recv()
            socket.send_multipart(frames, copy=False)


@contextmanager
def by_zmq(pool: Pool, paged: Paged) -> Iterator[Arrival]:
    """Ask the peer and scatter the frames from where ZeroMQ has put them."""
    endpoint = f"ipc://{pool.folder}/chunks.sock"
    pool.spawn(["-m", "benchmarks.transports", "--serve", endpoint])
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.linger = 0
        socket.rcvtimeo = int(DEADLINE_S * 1_000)
        socket.connect(endpoint)

        def fetch() -> None:
            socket.send(b"")
            frames = socket.recv_multipart(copy=False)
            arrive(paged, [_tensor(frame.buffer) for frame in frames])

        yield fetch


@contextmanager
def by_redis(pool: Pool, paged: Paged, binary: str) -> Iterator[Arrival]:
    """Get the values of all keys in one request and scatter them."""
    import redis

    path = pool.folder / "redis.sock"
    with _redis_server(binary, path), redis.Redis(unix_socket_path=str(path)) as client:
        _wait_for(client)
        keys = [f"chunk:{number}" for number in range(CHUNKS)]
        for key in keys:
            client.set(key, bytes(LAYOUT.chunk_bytes))

        def fetch() -> None:
            values: Any = client.mget(keys)
            arrive(paged, [_tensor(value) for value in values])

        yield fetch


@contextmanager
def _redis_server(binary: str, path: Path) -> Iterator[None]:
    """A Redis that only this benchmark can reach and that writes nothing anywhere."""
    options = [
        "--port",
        "0",
        "--unixsocket",
        str(path),
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(path.parent),
    ]
    with subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


def _redis_client() -> str:
    """Which of redis-py's parsers receives."""
    from redis.utils import HIREDIS_AVAILABLE

    return "redis-py with hiredis" if HIREDIS_AVAILABLE else "redis-py"


def _wait_for(client: Any) -> None:
    """Until it answers. Raises what the client raises if it does not."""
    import redis

    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            client.ping()
            return
        except redis.ConnectionError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)


def _tensor(received: Any) -> Tensor:
    """Received bytes as a chunk, in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # scatter only reads it
        chunk = torch.frombuffer(received, dtype=torch.uint8)
    if len(chunk) != LAYOUT.chunk_bytes:
        raise RuntimeError(f"got {len(chunk)} bytes, wanted a chunk of {LAYOUT.chunk_bytes}")
    return chunk


def run() -> list[Figure]:
    """Measure; takes some 20 s and up to 1.6 GiB of memory."""
    binary = shutil.which("redis-server")
    with (
        peer_pool(CHUNKS) as pool,
        connected_engine(pool, Paged(PAGES)) as subject,
        ExitStack() as ways,
    ):
        subject.store("pages")
        contestants: dict[str, Arrival] = {
            "VCache, from the peer's segment": partial(subject.retrieve, "pages"),
            "ZeroMQ, Unix socket, copy=False": ways.enter_context(by_zmq(pool, subject.paged)),
        }
        if binary is not None:
            contestants[f"Redis, Unix socket, {_redis_client()}"] = ways.enter_context(
                by_redis(pool, subject.paged, binary)
            )
        for arrival in contestants.values():
            arrival()
        times = interleaved([partial(timed, arrival) for arrival in contestants.values()], ROUNDS)
    figures = [rate(name, seconds) for name, seconds in zip(contestants, times, strict=True)]
    for name, seconds in list(zip(contestants, times, strict=True))[1:]:
        figures.append(Figure(f"VCache ÷ {name.split(',')[0]}", f"{ratio(seconds, times[0]):.1f} ×"))
    if binary is None:
        figures.append(Figure("Redis", "not installed"))
    return figures


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        from benchmarks.report import main

        main(TITLE, run)
