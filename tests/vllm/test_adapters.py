"""LoRA adapters count by what their files hold."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from integration.vllm import identity
from tests.vllm.halves import Scheduling, made_keys, request_of
from vcache.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("hashes")


def adapter_of(name: str, number: int = 1) -> Any:
    """A request with this adapter."""
    request = request_of(f"{name}-{number}", 70)
    request.lora_request = SimpleNamespace(lora_int_id=number, lora_path=name, load_inplace=False)
    return request


def adapter_files(folder: Path, weights: bytes) -> str:
    """An adapter on the disk."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return str(folder)


def test_an_adapter_without_files_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    half = Scheduling()
    request, table = adapter_of("somebody/adapter-that-is-nowhere"), [1, 2, 3, 4, 5]
    half.admit(request, table)
    assert half.matched_tokens(request, 0) == (0, False)
    assert request.request_id not in half._tracked


def test_an_adapter_of_the_hub_counts_by_its_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = adapter_files(tmp_path / "snapshot", b"weights")
    monkeypatch.setattr(identity, "_snapshot", lambda name, revision: place)
    made = made_keys()
    assert made.adapter(adapter_of("somebody/adapter")) == made.adapter(adapter_of(place))


def test_an_adapter_whose_files_change_is_not_shared_under_its_number(tmp_path: Path) -> None:
    made = made_keys()
    place = adapter_files(tmp_path / "adapter", b"weights")
    before = made.adapter(adapter_of(place))
    assert made.adapter(adapter_of(place)) == before
    adapter_files(tmp_path / "adapter", b"other weights")
    with pytest.raises(ArgumentError, match="lora_path"):
        made.adapter(adapter_of(place))
    assert made.adapter(adapter_of(place, number=2)) != before
