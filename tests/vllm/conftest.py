"""What several tests share: models and machines, for an engine takes half a minute to start; halves."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.vllm import keys
from tests.vllm import models
from tests.vllm.halves import Working
from tests.vllm.harness import Machine

TIMEOUT_S = 900
"""Of one test, which may be the one that starts the engines."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starting engines takes longer than other tests may."""
    for item in items:
        if "tests/vllm" in str(item.path):
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a model, or give the one that was made with the same arguments."""
    made: dict[str, Path] = {}

    def make(kind: str = "llama", **arguments: object) -> Path:
        name = "-".join([kind, *(f"{key}{value}" for key, value in sorted(arguments.items()))])
        if name not in made:
            made[name] = getattr(models, kind)(tmp_path_factory.mktemp("models") / name, **arguments)
        return made[name]

    return make


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A runtime directory of the module's own."""
    with Machine(tmp_path_factory.mktemp("engines")) as machine:
        yield machine


@pytest.fixture
def unused_port() -> Callable[[], int]:
    """A port that nobody has."""

    def find() -> int:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            return int(found.getsockname()[1])

    return find


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are made without a configuration of vLLM's."""
    monkeypatch.setattr(keys, "hashing", lambda config: (b"algorithm", b"seed"))


@pytest.fixture
def working() -> Iterator[Any]:
    """Make workers' halves; their threads end with the test."""
    made: list[Working] = []

    def make(**how: Any) -> Working:
        made.append(Working(**how))
        return made[-1]

    yield make
    for worker in made:
        worker.held.set()
        worker.close()
