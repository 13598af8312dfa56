"""`vcache` without a pool: parsing, configuration, errors in one line, imports, how things are shown."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from tests.cli_pool import environment, vcache
from vcache import logs
from vcache.cli import bench, main, present
from vcache.cli.command import COMMANDS
from vcache.cli.top import Look, interruptible, rates
from vcache.protocol import Statistics


@pytest.fixture(autouse=True)
def _own_logs() -> Iterator[None]:
    yield
    logs.unconfigure()


def test_help_names_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"\n  {name} " in said for name in COMMANDS)
    assert "no metadata server" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_the_common_options(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert said.startswith(f"usage: vcache {command}") and "--runtime-dir" in said


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["stats", "--nothing"], ["bench", "nothing"], ["list", "--limit", "x"]]
)
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_config_says_where_each_value_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "vcache.yaml"
    file.write_text("server:\n  policy: s3fifo\n")
    monkeypatch.setenv("VCACHE_CLIENT_REQUEST_TIMEOUT_MS", "77")
    options = ["--config", str(file), "--runtime-dir", str(tmp_path / "run")]
    assert main(["config", *options, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    fields = said["fields"]
    assert said["runtime_dir"] == str(tmp_path / "run")
    assert fields["server.policy"] == {"value": "s3fifo", "origin": f"file {file}"}
    assert fields["client.request_timeout_ms"]["origin"] == "env VCACHE_CLIENT_REQUEST_TIMEOUT_MS"
    assert fields["runtime_dir"]["origin"] == "argument"
    assert fields["device"]["origin"] == "default"
    assert not (tmp_path / "run").exists()

    assert main(["config", *options]) == 0
    assert "s3fifo" in capsys.readouterr().out


def test_common_options_may_stand_before_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--log-level", "error", "config"]) == 0
    assert json.loads(capsys.readouterr().out)["fields"]["log.level"]["value"] == "error"


def test_a_wrong_configuration_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "vcache.yaml"
    file.write_text("server:\n  polcy: lru\n")
    assert main(["stats", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vcache: server.polcy") and "did you mean 'policy'" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("command", [["stats"], ["list"], ["clear", "--yes"], ["top", "--once"]])
def test_without_a_server_a_command_says_what_to_do(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = tmp_path / "run"
    assert main([*command, "--runtime-dir", str(where)]) == 3
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert f"vcache-metadata --runtime-dir {where}" in said
    assert not where.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["segment", "--size", "3 apples"], 2, "size: got '3 apples'"),
        (["segment", "--size", "0"], 2, "--size: got 0"),
        (["segment", "--device", "gpu7"], 2, "device: got 'gpu7'"),
        (["segment", "--rank", "7"], 2, "--rank: got 7"),
        (["segment", "--device", "cuda:0", "--size", "auto"], 2, "--size: got auto"),
        (["segment", "--size", "1TiB"], 5, "does not fit: there are"),
        (["segment", "--size", "2MiB", "--numa", "99"], 5, "numa: got 99"),
        (["bench", "copy", "--chunks", "0"], 2, "--chunks: got 0"),
        (["bench", "copy", "--chunks", "100000"], 5, "MiB available"),
        (["bench", "copy", "--device", "gpu7"], 2, "device: got 'gpu7'"),
        (["bench", "copy", "--device", "cuda:9999"], 5, "CUDA_VISIBLE_DEVICES"),
        (["top", "--interval-s", "0"], 2, "--interval-s: got 0"),
        (["list", "--limit", "-1"], 2, "--limit: got -1"),
    ],
)
def test_bad_values_are_named_in_one_line(
    arguments: list[str], code: int, words: str, runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--runtime-dir", str(runtime_dir)]) == code
    said = capsys.readouterr().err
    assert words in said.splitlines()[-1] and "Traceback" not in said


def test_a_traceback_only_where_it_was_asked_for(runtime_dir: Path) -> None:
    asked = vcache("stats", "--runtime-dir", str(runtime_dir), "--log-level", "debug")
    assert asked.returncode == 3 and "Traceback" in asked.stderr
    assert asked.stderr.splitlines()[-1].startswith("vcache: no metadata server runs")


@pytest.mark.parametrize("command", ["config", "stats", "list", "top", "clear"])
def test_commands_that_only_look_leave_torch_out(command: str, runtime_dir: Path) -> None:
    code = (
        "import sys\nfrom vcache.cli import main\n"
        "main(sys.argv[1:])\nassert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    arguments = [command, "--runtime-dir", str(runtime_dir)]
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_whoever_stops_reading_is_no_error() -> None:
    code = (
        "import os, sys\nfrom vcache.cli import main\n"
        "read, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
        "sys.exit(main(['config', '--json']))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.fixture
def quick_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few rounds as there can be."""
    monkeypatch.setitem(bench._DEFAULTS, "copy", {**bench._DEFAULTS["copy"], "rounds": 1, "chunks": 1})
    monkeypatch.setitem(bench._DEFAULTS, "lookup", {"rounds": 1, "private": True})


@pytest.mark.usefixtures("quick_bench")
def test_bench_without_a_kind_measures_all(runtime_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--json", "--runtime-dir", str(runtime_dir)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said) == ["machine", "copy", "lookup"]
    assert {row["name"] for row in said["copy"]["rows"]} >= {"gather", "scatter"}
    assert "acquire + release" in {row["name"] for row in said["lookup"]["rows"]}


@pytest.mark.usefixtures("quick_bench")
def test_bench_of_one_kind_is_all_that_it_says(runtime_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "copy", "--json", "--runtime-dir", str(runtime_dir)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said) == ["machine", "device", "rows", "pairs"]
    assert (said["device"], said["pairs"]) == ("shm:0", [])


# -- how things are shown


def test_counts_are_no_sizes(runtime_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--runtime-dir", str(runtime_dir)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "MiB" not in lines["server.extents_max"]
    assert "(4 GiB)" in lines["server.pinned_bytes_max"]


def shown_at(width: int) -> list[str]:
    """A table on a terminal of that width."""
    table = present.table("pool", "segment", ">size", "holder")
    present.add_row(table, [1, "2 GiB", "4711 [bold]holder"])
    present.add_row(table, [22, "512 MiB", "4712 engine"])
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines() if line.strip()]


def test_a_table_that_fits_is_a_table() -> None:
    assert shown_at(60)[-1].split() == ["22", "512", "MiB", "4712", "engine"]


def test_a_table_that_does_not_fit_is_a_line_for_each_cell() -> None:
    assert shown_at(30) == [
        "pool",
        "  segment  1",
        "  size     2 GiB",
        "  holder   4711 [bold]holder",
        "  segment  22",
        "  size     512 MiB",
        "  holder   4712 engine",
    ]


@pytest.mark.parametrize(("count", "shown"), [(0, "0 warnings"), (1, "1 warning"), (2, "2 warnings")])
def test_what_is_counted_is_in_the_right_number(count: int, shown: str) -> None:
    assert present.counted(count, "warning") == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 30, "1 GiB"), (3 << 40, "3 TiB")],
)
def test_sizes(count: int, shown: str) -> None:
    assert present.size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.5, "0.5 s"), (90, "90 s"), (600, "10 min"), (7500, "2 h 5 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert present.duration(seconds) == shown


def test_what_a_peer_chose_is_neither_markup_nor_an_escape() -> None:
    assert present.text("[red]\x1b[2J").plain == "[red]\\x1b[2J"


def test_plain_values_for_json() -> None:
    class Row(msgspec.Struct):
        key: bytes
        more: dict[str, object]

    assert present.plain([Row(b"\x01\xff", {"a": (1, None)})]) == [{"key": "01ff", "more": {"a": [1, None]}}]


# -- rates


def look(at_s: float, **counters: float) -> Look:
    return Look(at_s, Statistics({"pid": 1.0, "uptime_s": at_s, **counters}, [], [], {}))


def test_rates_are_differences_of_counters() -> None:
    before = look(10.0, requests=100.0, wanted_chunks=50.0, hit_chunks=50.0)
    found = rates(before, look(12.0, requests=300.0, wanted_chunks=60.0, hit_chunks=55.0, evicted=4.0))
    assert found is not None
    assert (found.requests, found.evicted, found.hit_rate) == (100.0, 2.0, 0.5)


def test_no_chunks_wanted_is_no_hit_rate() -> None:
    found = rates(look(1.0), look(2.0))
    assert found is not None and found.hit_rate is None


@pytest.mark.parametrize("after", [look(2.0, pid=2.0), look(12.0, uptime_s=1.0), look(10.0)])
def test_a_restarted_server_gives_no_rates(after: Look) -> None:
    assert rates(look(10.0), after) is None


def test_an_interrupt_is_heard_wherever_it_comes_up() -> None:
    class Dropped:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)  # as an exception it would end here

    handler = signal.getsignal(signal.SIGINT)
    with interruptible() as interrupted_within:
        assert not interrupted_within(0)
        Dropped()
        assert interrupted_within(60)
    assert signal.getsignal(signal.SIGINT) is handler
