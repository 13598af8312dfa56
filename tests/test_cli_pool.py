"""The commands that look at a pool and change it, against a real server with real chunks."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli_pool import DEADLINE_S, command, environment, lender, server, store, vcache, vcache_json
from vcache.cli import main
from vcache.client import Client
from vcache.keys import namespace
from vcache.protocol import PROTOCOL_VERSION


@pytest.fixture
def pool(runtime_dir: Path) -> Iterator[Client]:
    """Its one segment's holder."""
    with server(runtime_dir), lender(runtime_dir) as client:
        yield client


def test_stats_shows_counters_segments_and_their_holders(pool: Client, runtime_dir: Path) -> None:
    store(pool, "llama", 3)
    said = vcache_json("stats", "--runtime-dir", str(runtime_dir))
    assert said["counters"]["chunks"] == 3
    (segment,) = said["segments"]
    assert segment["device"] == "shm:0" and segment["committed_bytes"] == 3 * 4096
    assert [row["name"] for row in said["sessions"]] == ["lender"]  # and not the one that asks
    assert segment["pid"] == said["sessions"][0]["pid"]
    assert said["labels"][namespace("llama").hex()] == "llama"


def test_stats_for_people(pool: Client, runtime_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(pool, "llama", 1)
    assert main(["stats", "--counters", "--runtime-dir", str(runtime_dir)]) == 0
    said = capsys.readouterr().out
    assert "shm:0" in said and "lender" in said and "1 chunks" in said and "uptime_s" in said


def test_list_goes_on_where_it_ended(pool: Client, runtime_dir: Path) -> None:
    keys = store(pool, "llama", 5)
    seen, cursor, pages = [], 0, 0
    while True:
        options = "--limit", "2", "--cursor", str(cursor)
        said = vcache_json("list", "--runtime-dir", str(runtime_dir), *options)
        seen += [row["key"] for row in said["chunks"]]
        cursor, pages = said["cursor"], pages + 1
        if not cursor:
            break
    assert pages == 3 and sorted(seen) == sorted(key.hex() for key in keys)


def test_list_of_one_model_passes_over_the_others(pool: Client, runtime_dir: Path) -> None:
    first = store(pool, "llama", 2)
    store(pool, "qwen", 3)
    more = store(pool, "llama", 2)
    options = "--runtime-dir", str(runtime_dir), "--model", "llama"
    page = vcache_json("list", *options, "--limit", "3")
    rest = vcache_json("list", *options, "--limit", "0", "--cursor", str(page["cursor"]))
    assert len(page["chunks"]) == 3 and rest["cursor"] == 0
    keys = [row["key"] for row in page["chunks"] + rest["chunks"]]
    assert sorted(keys) == sorted(key.hex() for key in first + more)
    assert vcache_json("list", "--runtime-dir", str(runtime_dir), "--model", "nobody")["chunks"] == []


def test_list_for_people_names_models(
    pool: Client, runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (key,) = store(pool, "llama", 1)
    assert main(["list", "--runtime-dir", str(runtime_dir)]) == 0
    said = capsys.readouterr().out
    assert key.hex()[:16] in said and "llama" in said and "4 KiB" in said


def test_clear_of_one_model_leaves_the_others(pool: Client, runtime_dir: Path) -> None:
    store(pool, "llama", 2)
    kept = store(pool, "qwen", 3)
    assert (
        vcache_json("clear", "--runtime-dir", str(runtime_dir), "--yes", "--model", "llama")["removed"] == 2
    )
    assert pool.contains(kept) == [True] * 3
    assert vcache_json("clear", "--runtime-dir", str(runtime_dir), "--yes")["removed"] == 3


def test_clear_does_nothing_where_nobody_can_be_asked(pool: Client, runtime_dir: Path) -> None:
    kept = store(pool, "llama", 2)
    ran = vcache("clear", "--runtime-dir", str(runtime_dir))
    assert ran.returncode == 2 and "--yes" in ran.stderr and "all 2 chunks" in ran.stderr
    assert pool.contains(kept) == [True] * 2


def test_top_once_shows_rates(pool: Client, runtime_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--runtime-dir", str(runtime_dir), "--once", "--interval-s", "0.05"]
    assert main(["top", *options, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["per_second"]["requests"] > 0 and len(said["segments"]) == 1
    assert main(["top", *options]) == 0
    assert "requests" in capsys.readouterr().out


def test_top_goes_on_until_interrupted(pool: Client, runtime_dir: Path) -> None:
    arguments = ["top", "--runtime-dir", str(runtime_dir), "--interval-s", "0.05", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "vcache.cli", *arguments], env=environment(), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        looks = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.terminate()
        assert process.wait(30) == 130
    assert all(each["counters"]["pid"] == looks[0]["counters"]["pid"] for each in looks)


def test_a_server_of_another_version_is_named(runtime_dir: Path) -> None:
    other = (
        "import sys, vcache.protocol\n"
        f"vcache.protocol.PROTOCOL_VERSION = {PROTOCOL_VERSION + 1}\n"
        "from metadata_server.server import main\nsys.exit(main())\n"
    )
    arguments = ["--runtime-dir", str(runtime_dir), "--idle-exit-s", "60"]
    with subprocess.Popen(
        [sys.executable, "-c", other, *arguments], env=environment(), stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        while b"ready" not in process.stderr.readline():
            assert process.poll() is None
        ran = vcache("stats", "--runtime-dir", str(runtime_dir))
        process.terminate()
    assert ran.returncode == 3
    assert "version" in ran.stderr and len(ran.stderr.splitlines()) == 1


def test_bench_of_requests_uses_the_server_that_is_there(pool: Client, runtime_dir: Path) -> None:
    kept = store(pool, "llama", 2)
    said = vcache_json("bench", "lookup", "--runtime-dir", str(runtime_dir), "--rounds", "20")
    assert said["private"] is False and said["machine"]["cores"] > 0
    assert [(row["name"], row["keys"]) for row in said["rows"]] == [
        ("ZeroMQ echo", 0),
        ("lookup", 1),
        ("lookup", 512),
        ("acquire + release", 128),
    ]
    assert all(0 < row["median_us"] <= row["p99_us"] for row in said["rows"])
    assert pool.stats().counters["chunks"] == len(kept)  # it took away what it brought


def test_bench_of_requests_brings_a_server_where_none_is(tmp_path: Path) -> None:
    said = vcache_json("bench", "lookup", "--runtime-dir", str(tmp_path / "run"), "--rounds", "5")
    assert said["private"] is True
    assert not (tmp_path / "run").exists()


def test_bench_of_copies() -> None:
    said = vcache_json("bench", "copy", "--chunks", "1", "--rounds", "1", "--threads", "1")
    assert {row["name"] for row in said["rows"]} >= {"gather", "scatter"}


def test_the_observers_leave_no_session(pool: Client, runtime_dir: Path) -> None:
    vcache_json("stats", "--runtime-dir", str(runtime_dir))
    with_ours = pool.stats().sessions
    assert [row.name for row in with_ours] == ["lender"]
    assert len(os.listdir(runtime_dir / "sessions")) == 1


# -- at a terminal


@contextmanager
def at_terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`vcache` with a terminal of its own, and that terminal's other end."""
    ours, theirs = os.openpty()
    variables = environment(TERM="xterm", COLUMNS="120", LINES="40")
    with subprocess.Popen(
        command(*arguments), env=variables, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        try:
            yield process, ours
        finally:
            process.kill()
            os.close(ours)


def read_until(terminal: int, words: str) -> str:
    """What the terminal showed, up to `words`."""
    seen = b""
    while words.encode() not in seen:
        assert select.select([terminal], [], [], DEADLINE_S)[0], seen
        seen += os.read(terminal, 1 << 16)
    return seen.decode(errors="replace")


@pytest.mark.parametrize(("answer", "code", "left"), [("y", 0, 0), ("n", 1, 2), ("", 1, 2)])
def test_clear_asks_first(pool: Client, runtime_dir: Path, answer: str, code: int, left: int) -> None:
    store(pool, "llama", 2)
    with at_terminal("clear", "--runtime-dir", str(runtime_dir)) as (process, terminal):
        read_until(terminal, "Forget all 2 chunks?")
        os.write(terminal, answer.encode() + b"\n")
        read_until(terminal, "forgot 2 chunks" if code == 0 else "nothing was forgotten")
        assert process.wait(DEADLINE_S) == code
    assert pool.stats().counters["chunks"] == left


def test_top_lives_through_a_restart_and_gives_the_terminal_back(runtime_dir: Path) -> None:
    options = "--runtime-dir", str(runtime_dir), "--interval-s", "0.05"
    with server(runtime_dir) as first, at_terminal("top", *options) as (process, terminal):
        read_until(terminal, f"server {first.pid}")
        first.kill()
        read_until(terminal, "waiting for the metadata server")
        with server(runtime_dir) as second:
            read_until(terminal, f"server {second.pid}")
            process.send_signal(signal.SIGINT)
            read_until(terminal, "\x1b[?1049l")  # leaves the alternate screen
            assert process.wait(DEADLINE_S) == 0
