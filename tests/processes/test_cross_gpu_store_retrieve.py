"""KV that one process stored is read by another one, whose segment lies on another GPU.

As a script it prints what it does, on shared memory or on real GPUs:

    python tests/processes/test_cross_gpu_store_retrieve.py [--devices cuda:0,cuda:1]
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.processes.content import LAYOUT, prompt
from tests.processes.pool import Pool
from tests.processes.worker import Worker

CHUNK = LAYOUT.chunk_tokens
SIZE = "2MiB"
"""A segment for 255 chunks; no GPU shares less."""

Scenario = Callable[[str, str], Iterator[str]]
"""Plays on two devices, asserts, and says what it has seen."""


def across(first: str, second: str) -> Iterator[str]:
    """Each of two processes reads out of the other one's segment what that one stored."""
    with Pool() as pool:
        pool.start_server()
        workers = [pool.engine(device=device, size=SIZE) for device in (first, second)]
        for seed, (writer, reader) in enumerate([workers, workers[::-1]]):
            count = 40 * CHUNK + 5
            assert reader.call("lookup", seed, count) == 0
            writer.call("store", seed, count)
            own = writer.call("stats")["own_segment"]
            assert _committed(pool)[own] == 40 * 8192, "a store goes to the own segment first"
            assert reader.call("lookup", seed, count) == 40 * CHUNK
            yield f"process {writer.pid} stored 40 chunks in its segment {own}"
            yield _read(reader, seed, count, 40)
        third = pool.engine(device=second)
        yield f"{_read(third, 0, 40 * CHUNK, 40)}; it lends no segment itself"
        pool.assert_nothing_leaks()


def spill(first: str, second: str) -> Iterator[str]:
    """A store that does not fit its own segment goes on in the peer's."""
    with Pool() as pool:
        pool.start_server()
        writer, reader = (pool.engine(device=device, size=SIZE) for device in (first, second))
        writer.call("store", 7, 300 * CHUNK)
        own, peer = (worker.call("stats")["own_segment"] for worker in (writer, reader))
        chunks = {number: nbytes // 8192 for number, nbytes in _committed(pool).items()}
        assert chunks == {own: 255, peer: 45}
        yield f"of 300 chunks {chunks[own]} went to the own segment, {chunks[peer]} to the peer's"
        for each in (reader, writer):
            yield _read(each, 7, 300 * CHUNK, 300)
        assert pool.counters().get("evicted", 0) == 0
        pool.assert_nothing_leaks()


def prefixes(first: str, second: str) -> Iterator[str]:
    """Of a prompt that goes on differently the common chunks are hits, and no others."""
    with Pool() as pool:
        pool.start_server()
        writer, reader = (pool.engine(device=device, size=SIZE) for device in (first, second))
        document = prompt(1, 10 * CHUNK + 3)
        writer.call("store_tokens", document)
        for common in (10 * CHUNK, 9 * CHUNK + 1, 4 * CHUNK - 1, CHUNK, CHUNK - 1, 0):
            tokens = document[:common] + prompt(2, 12 * CHUNK - common)
            assert reader.call("retrieve_tokens", tokens) == (common // CHUNK * CHUNK, 0)
            yield f"{common} common tokens: {common // CHUNK} chunks hit"
        pool.assert_nothing_leaks()


def conversations(first: str, second: str) -> Iterator[str]:
    """Random turns over shared documents, stored by either process; every hit is as long as it must be."""
    rng = random.Random(20)
    with Pool() as pool:
        pool.start_server()
        workers = [pool.engine(device=device, size=SIZE) for device in (first, second)]
        stored: set[tuple[int, ...]] = set()
        told: list[list[int]] = [[]]
        hit = 0
        for seed in range(1, 31):
            before = rng.choice(told)
            tokens = before[: rng.randint(0, len(before))] + prompt(seed, rng.randint(1, 8 * CHUNK))
            chunks = [tuple(tokens[:end]) for end in range(CHUNK, len(tokens) + 1, CHUNK)]
            known = next((at for at, chunk in enumerate(chunks) if chunk not in stored), len(chunks))
            writer, reader = rng.sample(workers, 2)
            assert reader.call("retrieve_tokens", tokens) == (known * CHUNK, 0)
            writer.call("store_tokens", tokens)
            assert reader.call("retrieve_tokens", tokens) == (len(chunks) * CHUNK, 0)
            stored.update(chunks)
            told.append(tokens)
            hit += known
        assert hit, "the prompts share nothing"
        assert pool.counters()["chunks"] == len(stored)
        yield f"30 prompts in {len(stored)} chunks; {hit} chunks of a prompt were there before it"
        pool.assert_nothing_leaks()


def pages(first: str, second: str) -> Iterator[str]:
    """The same in the connectors' form: verbatim pages under keys of the caller's."""
    with Pool() as pool:
        pool.start_server()
        writer, reader = (pool.engine(device=device, size=SIZE, pages=True) for device in (first, second))
        document = prompt(3, 20 * CHUNK)
        writer.call("store_tokens", document)
        tokens = document + prompt(4, 2 * CHUNK)
        assert reader.call("retrieve_tokens", tokens) == (20 * CHUNK, 0)
        yield f"process {reader.pid} loaded 20 of 22 chunks as pages, every byte right"
        other = pool.engine(device=second)
        assert other.call("retrieve_tokens", document) == (0, 0), "another form is another layout"
        pool.assert_nothing_leaks()


def _committed(pool: Pool) -> dict[int, int]:
    return {row.segment: row.committed_bytes for row in pool.statistics().segments}


def _read(reader: Worker, seed: int, count: int, chunks: int) -> str:
    began_s = time.perf_counter()
    assert reader.call("retrieve", seed, count) == (chunks * CHUNK, 0)
    took_ms = (time.perf_counter() - began_s) * 1e3
    return f"process {reader.pid} loaded {chunks} chunks, every byte right ({took_ms:.1f} ms with the check)"


SCENARIOS = (across, spill, prefixes, conversations, pages)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_shared_memory(scenario: Scenario) -> None:
    """Two labels of shared memory play two GPUs."""
    assert list(scenario("shm:0", "shm:1"))


@pytest.mark.gpu
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_gpus(scenario: Scenario) -> None:
    """On the first two GPUs, or twice on the only one: CUDA IPC is between processes either way."""
    import torch

    assert torch.cuda.is_available(), "no GPU is here"
    assert list(scenario("cuda:0", "cuda:1" if torch.cuda.device_count() > 1 else "cuda:0"))


def main() -> int:
    """Play all scenarios and print what they say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", default="shm:0,shm:1", help="two devices, such as cuda:0,cuda:1")
    os.environ.setdefault("VCACHE_LOG_LEVEL", "error")
    logging.getLogger("vcache").addHandler(logging.NullHandler())
    first, second = parser.parse_args().devices.split(",")
    for scenario in SCENARIOS:
        print(f"{scenario.__doc__}")
        for line in scenario(first, second):
            print(f"    {line}")
    print("All bytes were right, and nothing leaked.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
