"""`vcache tier` and what it says of wrong arguments."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.client_pool import alive
from tests.processes.worker import DEADLINE_S, eventually
from vcache.cli import main
from vcache.cli.exits import Exit
from vcache.limits import MIB
from vcache.tiers.rocksdb.tier import RocksTier

LAYOUT = b"L" * 16


@pytest.fixture
def tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RocksTier]:
    monkeypatch.setenv("VCACHE_TIERS_ORDER", "rocksdb")
    monkeypatch.setenv("VCACHE_TIERS_ROCKSDB_DIRECTORY", str(tmp_path / "tier"))
    monkeypatch.setenv("VCACHE_TIERS_DEADLINE_MS", "60000")
    made = RocksTier(tmp_path / "tier", capacity_bytes=64 * MIB, deadline_s=DEADLINE_S)
    pid = made.state().pid
    yield made
    made.close()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not alive(pid), "the owner ends")


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def put(tier: RocksTier, *numbers: int) -> None:
    for number in numbers:
        assert tier.put(key(number), torch.full((1000,), number, dtype=torch.uint8), LAYOUT)


def said(capsys: pytest.CaptureFixture[str], *command: str) -> Any:
    assert main(["tier", *command, "--json"]) == Exit.OK
    return json.loads(capsys.readouterr().out)


def test_it_lists_gets_verifies_and_purges(
    tier: RocksTier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tier, 1, 2, 3)
    rows = said(capsys, "ls")["records"]
    assert [row["key"] for row in rows] == [key(number).hex() for number in (1, 2, 3)]
    assert len(said(capsys, "ls", "--limit", "2")["records"]) == 2
    assert said(capsys, "status")["records"] == 3
    out = tmp_path / "chunk"
    assert said(capsys, "get", key(2).hex(), "--out", str(out))["size"] == 1128
    assert out.read_bytes() == b"\2" * 1000
    assert said(capsys, "verify") == {"whole": 3, "damaged": []}
    for command in (["ls"], ["status"], ["verify"]):
        assert main(["tier", *command]) == Exit.OK
    assert "3 of 3 records" in capsys.readouterr().out
    assert said(capsys, "purge", "--yes") == {"purged": ["rocksdb"], "failed": {}}
    assert said(capsys, "status")["records"] == 0
    state = tier.state()
    assert (state.capacity_bytes, state.counters["uses"]) == (64 * MIB, 0), "commands leave engines' settings"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["get"], "KEY: got None, wanted a chunk key for get"),
        (["ls", "00"], "KEY: got 00, wanted a chunk key for get, and none"),
        (["get", "zz"], "KEY: got zz, wanted 64 hexadecimal digits"),
        (["ls", "--limit", "-1"], "--limit: got -1, wanted 0 or more"),
        (["purge"], "--yes"),
    ],
)
def test_wrong_arguments_are_named(
    tier: RocksTier, capsys: pytest.CaptureFixture[str], command: list[str], words: str
) -> None:
    assert main(["tier", *command]) == Exit.USAGE
    assert words in capsys.readouterr().err


def test_a_key_that_is_not_there(tier: RocksTier, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tier", "get", key(9).hex()]) == Exit.FAILED
    assert "no such record" in capsys.readouterr().err


def test_a_directory_that_is_not_there_is_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VCACHE_TIERS_ROCKSDB_DIRECTORY", str(tmp_path / "none"))
    assert main(["tier", "status"]) == Exit.NO_SERVER
    assert f"there is no local tier at {tmp_path / 'none'}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_purge_without_a_tier(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tier", "purge", "--yes"]) == Exit.USAGE
    assert "tiers.order: got none" in capsys.readouterr().err
