"""The holder, as a process of its own: lends, says so, comes back, ends in order."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli_pool import DEADLINE_S, command, config_of, environment, server, store
from vcache.client import Client
from vcache.limits import MIB


@contextmanager
def holder(path: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    arguments = ["segment", "--runtime-dir", str(path), "--size", "8MiB", *options]
    variables = environment(VCACHE_SERVER_AUTOSTART="false")
    with subprocess.Popen(
        command(*arguments), env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def lent(process: subprocess.Popen[bytes]) -> Any:
    """The next line that it prints."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read().decode() if process.stderr else ""
    return json.loads(line)


def observer(path: Path) -> Client:
    client = Client(config_of(path), name="observer")
    assert client.wait_connected(DEADLINE_S)
    return client


def test_it_lends_until_it_is_told_to_end(runtime_dir: Path) -> None:
    with server(runtime_dir), holder(runtime_dir, "--json", "--device", "shm:3", "--rank", "1") as process:
        said = lent(process)
        assert said == {"segment": 1, "device": "shm:3", "size": 8 * MIB, "pid": process.pid}
        client = observer(runtime_dir)
        (row,) = client.stats().segments
        assert (row.device, row.rank, row.held) == ("shm:3", 1, True)
        store(client, "llama", 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
        assert client.stats().segments == []
        client.close()


def test_for_people_it_says_when_it_is_ready(runtime_dir: Path) -> None:
    with server(runtime_dir), holder(runtime_dir) as process:
        assert process.stdout is not None
        assert process.stdout.readline().decode().startswith("ready: segment 1, 8 MiB on shm:0")
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0


def test_it_waits_for_a_server(runtime_dir: Path) -> None:
    with holder(runtime_dir, "--json") as process:
        assert process.stderr is not None
        while b"no metadata server listens" not in process.stderr.readline():
            assert process.poll() is None
        with server(runtime_dir):
            assert lent(process)["segment"] == 1


def test_told_to_end_while_it_waits_it_ends(runtime_dir: Path) -> None:
    with holder(runtime_dir) as process:
        assert process.stderr is not None
        while b"no metadata server listens" not in process.stderr.readline():
            assert process.poll() is None
        process.terminate()
        assert process.wait(DEADLINE_S) == 0


def test_a_restarted_server_finds_it_warm(runtime_dir: Path) -> None:
    with holder(runtime_dir, "--json") as process, server(runtime_dir) as first:
        assert lent(process)["segment"] == 1
        client = observer(runtime_dir)
        keys = store(client, "llama", 3)
        first.kill()
        first.wait(DEADLINE_S)
        with server(runtime_dir):
            assert client.wait_connected(DEADLINE_S)
            assert client.contains(keys) == [True] * 3
            client.close()


def test_after_a_cold_start_it_lends_new_memory(runtime_dir: Path) -> None:
    with holder(runtime_dir, "--json") as process, server(runtime_dir) as first:
        lent(process)
        client = observer(runtime_dir)
        store(client, "llama", 3)
        (before,) = client.stats().segments
        first.kill()
        first.wait(DEADLINE_S)
        (runtime_dir / "extents").unlink()
        with server(runtime_dir):
            assert lent(process)["pid"] == process.pid
            assert client.wait_connected(DEADLINE_S)
            (after,) = client.stats().segments
            assert client.stats().counters["chunks"] == 0
            assert after.segment_id != before.segment_id
            client.close()


def test_it_goes_on_when_nobody_reads_its_output(runtime_dir: Path) -> None:
    with server(runtime_dir) as first, holder(runtime_dir, "--json") as process:
        lent(process)
        assert process.stdout is not None
        process.stdout.close()
        client = observer(runtime_dir)
        first.kill()
        first.wait(DEADLINE_S)
        (runtime_dir / "extents").unlink()
        with server(runtime_dir):
            assert process.stderr is not None
            while b"nobody reads our output" not in process.stderr.readline():
                assert process.poll() is None
            assert client.wait_connected(DEADLINE_S)
            assert [row.held for row in client.stats().segments] == [True]
            client.close()
            process.terminate()
            assert process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("size", ["1TiB", "0", "1"])
def test_a_size_that_cannot_be_had_ends_it_at_once(runtime_dir: Path, size: str) -> None:
    with holder(runtime_dir, "--size", size) as process:
        out, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == (5 if size == "1TiB" else 2)
        assert out == b"" and b"Traceback" not in err
        assert (b"MiB available of" if size == "1TiB" else b"--size: got " + size.encode()) in err
