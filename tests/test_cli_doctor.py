"""The doctor tests for real, judges rightly and leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.cli_pool import lender, server, vcache
from vcache import logs
from vcache.cli import main
from vcache.cli.check_segments import Pair, exchange, judge, pair_table
from vcache.cli.check_vllm import HOLDER_CONTEXT_BYTES, MARGIN_BYTES, planned_bytes, utilization
from vcache.cli.check_vllm import judge as judge_vllm
from vcache.cli.findings import Finding, findings_of
from vcache.cli.peer import Peer, is_pattern, pattern
from vcache.errors import SegmentError
from vcache.limits import GIB, MIB
from vcache.segment import DATA_OFFSET, allocate

Doctor = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Iterator[Doctor]:
    """Run it in this process (which has torch already): exit code, and findings by check."""

    def run(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
        code = main(["doctor", "--runtime-dir", str(path), "--json", *options])
        said = capsys.readouterr()
        assert said.err == ""
        return code, {each["check"]: each for each in json.loads(said.out)["findings"]}

    yield run
    logs.unconfigure()


def test_with_a_server_and_a_segment_all_is_well(doctor: Doctor, runtime_dir: Path) -> None:
    with server(runtime_dir) as process, lender(runtime_dir):
        code, found = doctor(runtime_dir)
    assert code == 0
    assert found["server"]["facts"]["pid"] == process.pid
    assert found["shared memory"]["verdict"] == "ok" and found["shared memory"]["facts"]["gbytes_per_s"] > 0
    assert found["kernel"]["verdict"] == found["memory"]["verdict"] == "ok"
    assert found["GPU"]["verdict"] == "skipped" and "pool" not in found


def test_a_pool_without_segments_is_warned_of(doctor: Doctor, runtime_dir: Path) -> None:
    with server(runtime_dir):
        code, found = doctor(runtime_dir)
    assert code == 0
    assert found["pool"]["verdict"] == "warning" and "vcache segment" in found["pool"]["advice"]


def test_without_a_server_it_says_so_and_leaves_nothing(doctor: Doctor, tmp_path: Path) -> None:
    code, found = doctor(tmp_path / "run")
    assert code == 3
    assert found["server"]["verdict"] == "failed" and "vcache-metadata" in found["server"]["advice"]
    assert found["shared memory"]["verdict"] == "ok"
    assert os.listdir(tmp_path) == []


def test_with_start_it_tests_a_server_and_ends_it(doctor: Doctor, tmp_path: Path) -> None:
    code, found = doctor(tmp_path / "run", "--start")
    assert code == 0
    assert "started for this test" in found["server"]["found"]
    assert os.listdir(tmp_path) == []


def test_a_runtime_directory_that_was_there_stays_as_it_was(doctor: Doctor, runtime_dir: Path) -> None:
    code, _ = doctor(runtime_dir, "--start")
    assert code == 0
    assert os.listdir(runtime_dir) == ["sessions"] and os.listdir(runtime_dir / "sessions") == []


def test_a_runtime_directory_open_to_others_is_found(doctor: Doctor, runtime_dir: Path) -> None:
    runtime_dir.chmod(0o755)
    code, found = doctor(runtime_dir)
    assert code == 1
    assert found["runtime directory"]["verdict"] == "failed"
    assert "chmod 700" in found["runtime directory"]["found"]


def test_memory_that_does_not_suffice_is_found(
    doctor: Doctor, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VCACHE_SEGMENT_SIZE", "1TiB")
    code, found = doctor(runtime_dir, "--start")
    assert code == 1
    assert found["memory"]["verdict"] == "failed" and "does not fit" in found["memory"]["found"]
    assert "segment.size" in found["memory"]["advice"]


def test_a_gpu_that_is_configured_and_not_there_is_a_failure(
    doctor: Doctor, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VCACHE_DEVICE", "cuda:0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, found = doctor(runtime_dir, "--start")
    assert code == 1
    assert found["GPU"]["verdict"] == "failed" and "shm:0" in found["GPU"]["advice"]


def test_for_people_it_prints_a_line_each(runtime_dir: Path) -> None:
    ran = vcache("doctor", "--runtime-dir", str(runtime_dir), "--start")
    assert ran.returncode == 0, ran.stdout
    assert "✓ shared memory: " in ran.stdout
    assert ran.stdout.splitlines()[-1] == "0 failed, 1 warning, 6 checks", (
        "of a directory that is on no tmpfs"
    )


def test_the_second_process_notices_other_bytes() -> None:
    with Peer() as peer, allocate("shm:0", 4 * MIB) as segment:
        view = segment.view(DATA_OFFSET, len(pattern(1)))
        view.copy_(pattern(1))
        assert peer.probe(segment, 2).error == "the second process reads other bytes than were written"
        assert peer.probe(segment, 1).error == ""
        assert is_pattern(view, 2)
        del view


def test_a_check_that_raises_has_failed_with_its_words() -> None:
    def check() -> Any:
        yield Finding(check="a", verdict="ok", found="b")
        raise SegmentError("no memory\nat all")

    assert [(each.verdict, each.found) for each in findings_of("c", check)] == [
        ("ok", "b"),
        ("failed", "no memory at all"),
    ]


def test_pairs_of_gpus_are_judged() -> None:
    pairs = [
        Pair("cuda:0", "cuda:0", True, "", 1500.0, 1400.0, 3.0, "a file descriptor"),
        Pair("cuda:0", "cuda:1", False, "", 20.0, 10.0, 7.0, "legacy CUDA IPC"),
        Pair("cuda:1", "cuda:0", False, "no peer access", 0.0),
    ]
    found = {each.verdict: each for each in judge(pairs)}
    assert "cuda:1 read from cuda:0: no peer access" in found["failed"].found
    assert "cuda:0 from cuda:1" in found["warning"].found
    said = found["ok"].found
    assert "2 of 3 pairs; read at 20 to 1500 GB/s, written at 10 to 1400 GB/s, opened in 7 ms" in said
    assert "exported by a file descriptor and legacy CUDA IPC" in said


def test_the_matrix_has_both_directions_of_every_pair() -> None:
    pairs = [
        Pair(f"cuda:{holder}", f"cuda:{reader}", True, "", 100.0 + holder, 50.0 + reader)
        for holder in (0, 1, 10)
        for reader in (0, 1, 10)
        if (holder, reader) != (1, 10)
    ]
    pairs[0] = Pair("cuda:0", "cuda:0", True, "broken", 0.0)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(pair_table([dict(vars(pair)) for pair in pairs]))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip().startswith("cuda")]
    assert [line[0] for line in lines] == ["cuda:0", "cuda:1", "cuda:10"]
    assert lines[0][1] == "failed"
    assert " ".join(lines[1][1:]) == "101 / 50 101 / 51 –"
    assert " ".join(lines[2][1:]) == "110 / 50 110 / 51 110 / 60"


def test_both_directions_are_measured_and_the_bytes_stay_right() -> None:
    with Peer() as peer, allocate("shm:0", 8 * MIB) as segment:
        probed = exchange(peer, segment, own_device=None, seed=5)
        assert probed.error == ""
        assert min(probed.gbytes_per_s, probed.written_gbytes_per_s, probed.opened_ms) > 0
        unmeasured = exchange(peer, segment, own_device=None, seed=7, is_measured=False)
        assert (unmeasured.error, unmeasured.gbytes_per_s) == ("", 0.0)


# -- which gpu_memory_utilization fits


@pytest.mark.parametrize(
    ("free", "total", "planned", "margin", "share"),
    [
        (80, 80, 0, 0, 1.0),
        (79, 80, 0, 0, 0.98),  # 0.9875, rounded down
        (80, 80, 16, 0, 0.8),
        (80, 80, 16, 4, 0.75),
        (64, 80, 0, 0, 0.8),
        (16, 80, 16, 0, 0.0),
        (1, 80, 16, 4, 0.0),
        (100, 80, 0, 0, 1.0),
        (0, 0, 0, 0, 0.0),
    ],
)
def test_the_share_that_is_free_is_rounded_down(
    free: int, total: int, planned: int, margin: int, share: float
) -> None:
    found = utilization(free * GIB, total * GIB, planned=planned * GIB, margin=margin * GIB)
    assert found == share


@given(
    free=st.integers(0, 200 * GIB),
    total=st.integers(1, 200 * GIB),
    planned=st.integers(0, 50 * GIB),
)
def test_what_vllm_is_given_is_free(free: int, total: int, planned: int) -> None:
    """vLLM compares share × total with what is free at its start; one percent more would not fit."""
    free = min(free, total)
    share = utilization(free, total, planned=planned)
    left = free - planned - MARGIN_BYTES
    assert 0.0 <= share <= 1.0
    assert round(share * 100) * total <= max(0, left) * 100
    assert (round(share * 100) + 1) * total > left * 100


def test_a_holder_still_to_be_started_takes_its_context_too() -> None:
    assert planned_bytes(0) == 0
    assert planned_bytes(16) == 16 * GIB + HOLDER_CONTEXT_BYTES
    assert planned_bytes(0.5) == GIB // 2 + HOLDER_CONTEXT_BYTES


def test_a_gpu_is_judged_with_how_it_was_computed() -> None:
    beside = judge_vllm("cuda:0", 60 * GIB, 80 * GIB, lent=16 * GIB, planned=0)
    assert (beside.verdict, beside.facts["gpu_memory_utilization"]) == ("ok", 0.74)
    assert "--gpu-memory-utilization 0.74: 60 GiB of 80 GiB free; holders lend 16 GiB" in beside.found
    early = judge_vllm("cuda:1", 80 * GIB, 80 * GIB, lent=0, planned=0)
    assert early.verdict == "warning" and "--segment-gib" in early.advice
    planned = judge_vllm("cuda:1", 80 * GIB, 80 * GIB, lent=0, planned=planned_bytes(16))
    assert (planned.verdict, planned.facts["gpu_memory_utilization"]) == ("ok", 0.78)
    full = judge_vllm("cuda:2", GIB // 4, 80 * GIB, lent=0, planned=0)
    assert full.verdict == "failed" and "smaller segment" in full.advice


def test_vllms_share_is_of_gpus(doctor: Doctor, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, found = doctor(runtime_dir, "--vllm", "--segment-gib", "16")
    assert code == 1
    assert list(found) == ["vLLM"]
    assert found["vLLM"]["verdict"] == "failed" and "none can be used" in found["vLLM"]["found"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--segment-gib", "16"], "--segment-gib: got 16.0, wanted --vllm beside it"),
        (["--vllm", "--segment-gib", "-1"], "--segment-gib: got -1.0, wanted a number of GiB"),
        (["--vllm", "--segment-gib", "nan"], "--segment-gib: got nan, wanted a number of GiB"),
    ],
)
def test_a_wrong_segment_is_named(
    options: list[str], words: str, runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--runtime-dir", str(runtime_dir), *options]) == 2
    assert words in capsys.readouterr().err
