"""The doctor tests for real, judges rightly and leaves nothing behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli_pool import lender, server, vcache
from vcache import logs
from vcache.cli import main
from vcache.cli.check_segments import Pair, judge, pair_table
from vcache.cli.findings import Finding, findings_of
from vcache.cli.peer import Peer, is_pattern, pattern
from vcache.errors import SegmentError
from vcache.limits import MIB
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
    assert "✓ shared memory: " in ran.stdout and "0 failed" in ran.stdout


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


def test_pairs_of_gpus_arejudged() -> None:
    pairs = [
        Pair("cuda:0", "cuda:0", True, "", 1500.0),
        Pair("cuda:0", "cuda:1", False, "", 20.0),
        Pair("cuda:1", "cuda:0", False, "no peer access", 0.0),
    ]
    found = {each.verdict: each for each in judge(pairs)}
    assert "cuda:1 read from cuda:0: no peer access" in found["failed"].found
    assert "cuda:0 from cuda:1" in found["warning"].found
    assert "2 of 3 pairs, 20 to 1500 GB/s" in found["ok"].found
    listed = found["ok"].facts["pairs"]
    assert isinstance(listed, list) and pair_table(listed) is not None
