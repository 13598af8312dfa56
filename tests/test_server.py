"""`vcache-metadata` as a command: its options, its logs, how it ends and with which exit code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes.pool import ROOT
from tests.processes.worker import eventually
from tests.support.raw_peer import DEADLINE_S, LAYOUT, RawPeer
from vcache import protocol
from vcache.protocol import ErrorCode, Found, Listed


class Commands:
    """Runs `vcache-metadata`, and ends what is left of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        """Start it; standard error is read by whoever asks."""
        process = subprocess.Popen(
            [sys.executable, "-m", "metadata_server.server", *options],
            cwd=ROOT,
            env={**os.environ, "VCACHE_RUNTIME_DIR": str(self.path), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def ready(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        """Start it and wait until it listens."""
        process = self.start(*options, **environment)
        eventually(lambda: _listens(self.path), "the server listens", DEADLINE_S)
        return process

    def run(self, *options: str, **environment: str) -> tuple[int, str, str]:
        """Its exit code, and what it wrote to standard output and standard error."""
        process = self.start(*options, **environment)
        output, errors = process.communicate(timeout=DEADLINE_S)
        return process.returncode, output, errors

    def close(self) -> None:
        """End everything."""
        for process in self._started:
            process.kill()
            process.communicate()


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        return caller.connect_ex(str(path / "session.sock")) == 0 and (path / "rpc.sock").exists()


@pytest.fixture
def command(runtime_dir: Path) -> Iterator[Commands]:
    """The command, in a runtime directory of its own."""
    commands = Commands(runtime_dir / "run")
    yield commands
    commands.close()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and what it wrote to standard error."""
    _, errors = process.communicate(timeout=DEADLINE_S)
    return process.returncode, errors


# -- options


def test_check_config_says_nothing_when_it_is_right(command: Commands, tmp_path: Path) -> None:
    file = tmp_path / "vcache.yaml"
    file.write_text("server:\n  policy: s3fifo\n  lease_ms: 100\n")
    assert command.run("--check-config", "--config", str(file)) == (0, "", "")
    assert not command.path.exists(), "nothing was made"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("server:\n  polcy: lru\n", ["server.polcy", "'policy'"]),
        ("server:\n  policy: mru\n", ["server.policy", "mru", "lru"]),
        ("server:\n  lease_ms: soon\n", ["server.lease_ms", "soon"]),
        ("server:\n  lease_ms: 1\n", ["server.lease_ms", "1"]),
        ("server:\n  extents_max: 2\n", ["server.extents_max", "2"]),
        ("log:\n  format: xml\n", ["log.format", "xml", "json"]),
        ("server: [1, 2]\n", ["server", "[1, 2]"]),
        (":", []),
    ],
)
def test_wrong_configuration_is_an_error_that_names_the_field(
    command: Commands, tmp_path: Path, text: str, named: list[str]
) -> None:
    file = tmp_path / "vcache.yaml"
    file.write_text(text)
    code, output, errors = command.run("--check-config", "--config", str(file))
    assert (code, output) == (2, "")
    assert errors.startswith("vcache-metadata: ")
    assert errors.count("\n") == 1, "one line, no traceback"
    for name in (*named, str(file)):
        assert name in errors


def test_server_does_not_start_with_a_wrong_configuration(command: Commands, tmp_path: Path) -> None:
    file = tmp_path / "vcache.yaml"
    file.write_text("server:\n  policy: mru\n")
    code, _, errors = command.run(VCACHE_CONFIG=str(file))
    assert code == 2
    assert "server.policy" in errors
    assert not command.path.exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--polcy", "lru"], "--polcy"),
        (["--policy", "mru"], "--policy"),
        (["--idle-exit-s", "soon"], "--idle-exit-s"),
        (["--idle-exit-s", "-1"], "server.idle_exit_s"),
        (["--log-level", "loud"], "--log-level"),
        (["--config", "/does/not/exist.yaml"], "/does/not/exist.yaml"),
        (["--runtime-dir", "/" + "x" * 120], "runtime_dir"),
        (["--log-file", "/does/not/exist/server.log"], "log.file"),
        (["extra"], "extra"),
    ],
)
def test_wrong_option_is_an_error_that_names_it(command: Commands, options: list[str], named: str) -> None:
    code, output, errors = command.run(*options)
    assert (code, output) == (2, "")
    assert named in errors
    assert "Traceback" not in errors


def test_unknown_and_wrong_variables_are_errors(command: Commands) -> None:
    code, _, errors = command.run(VCACHE_SERVER_POLCY="lru")
    assert code == 2
    assert "VCACHE_SERVER_POLCY" in errors
    code, _, errors = command.run(VCACHE_SERVER_LEASE_MS="never")
    assert code == 2
    assert "server.lease_ms" in errors
    assert "VCACHE_SERVER_LEASE_MS" in errors


def test_directory_that_others_may_enter_is_refused(command: Commands) -> None:
    command.path.mkdir(mode=0o755)
    command.path.chmod(0o755)
    code, _, errors = command.run()
    assert code == 2
    assert "runtime_dir" in errors
    assert "700" in errors


def test_help_tells_the_exit_codes(command: Commands) -> None:
    code, output, _ = command.run("--help")
    assert code == 0
    for meaning in (
        "0 ended as asked",
        "2 wrong configuration",
        "3 another server",
        "4 the runtime directory",
    ):
        assert meaning in " ".join(output.split())


# -- logs


def test_json_log_is_one_value_a_line(command: Commands) -> None:
    process = command.ready("--log-format", "json", "--log-level", "debug")
    with RawPeer(command.path, session=77) as peer:
        peer.channel.exchange(b"\xff\nnot a frame")
    process.terminate()
    code, errors = finish(process)
    assert code == 0
    lines = [json.loads(line) for line in errors.splitlines()]
    assert all({"time", "level", "logger", "pid", "message"} <= line.keys() for line in lines)
    messages = [line["message"] for line in lines]
    assert messages.index("ready") < messages.index("session began") < messages.index("session ended")
    began = lines[messages.index("session began")]
    assert (began["session"], began["name"], began["level"]) == (f"{77:016x}", "raw", "info")
    assert messages[-1] == "ended"
    assert {"refused"} <= set(messages)


def test_log_goes_to_the_file_and_follows_its_rotation(command: Commands, tmp_path: Path) -> None:
    file = tmp_path / "server.log"
    process = command.ready("--log-file", str(file))
    eventually(lambda: " ready " in file.read_text(), "it has said that it is ready")
    file.rename(tmp_path / "server.log.1")
    with RawPeer(command.path):
        eventually(lambda: file.exists() and "session began" in file.read_text(), "it writes to the new file")
    process.terminate()
    assert finish(process) == (0, "")


# -- ends


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_and_nothing_is_left(command: Commands, number: int) -> None:
    process = command.ready()
    process.send_signal(number)
    assert finish(process)[0] == 0
    left = {path.name for path in command.path.iterdir()}
    assert left <= {"sessions", "server.lock"}


def test_ending_server_answers_what_is_there_and_grants_nothing(command: Commands) -> None:
    process = command.ready()
    with RawPeer(command.path) as peer:
        assert peer.pong()
        process.send_signal(signal.SIGSTOP)
        frames = [peer.frame(protocol.Ping(), rid=rid) for rid in range(2, 52)]
        reserve = peer.frame(protocol.Reserve(LAYOUT, 4096, count=1), rid=52)
        for frame in (*frames, reserve):
            peer.channel.socket.send(frame)
        process.terminate()
        process.send_signal(signal.SIGCONT)
        answers = [peer.channel.receive() for _ in range(51)]
        assert [answer.rid for answer, _ in answers] == list(range(2, 53))
        assert all(isinstance(reply, protocol.Pong) for _, reply in answers[:50])
        refused = answers[50][1]
        assert isinstance(refused, protocol.Reserved) or refused.code == ErrorCode.DRAINING  # type: ignore[union-attr]
        assert peer.connection.hung_up()
        assert finish(process)[0] == 0
        command.ready()
        peer.come_back()


def test_shutdown_request_ends_it_as_sigterm_does(command: Commands) -> None:
    process = command.ready()
    with RawPeer(command.path) as peer:
        assert peer.ask(protocol.Shutdown(), protocol.Done)
        assert finish(process)[0] == 0
        command.ready()
        peer.come_back()


def test_table_outlives_a_server_that_was_ended_while_sessions_lived(command: Commands) -> None:
    process = command.ready()
    with RawPeer(command.path) as peer:
        peer.lend(64 << 10)
        got = peer.reserve(count=2)
        peer.commit(got[:1], [b"k" * 32])
        process.terminate()
        assert finish(process)[0] == 0
        assert (command.path / "extents").exists()
        command.ready()
        peer.come_back()
        assert peer.welcome.resumed
        peer.ask(protocol.Declare(peer.last_rid, peer.handles(got[1:]), []), protocol.Done)
        assert peer.ask(protocol.Lookup(b"k" * 32, LAYOUT), Found).prefix == 1
        assert len(peer.ask(protocol.List(), Listed).rows) == 1
        assert peer.commit(got[1:], [b"l" * 32]) == b"\0"
        peer.ask(protocol.Check(), protocol.Done)


def test_failing_to_start_for_another_reason_says_why(command: Commands) -> None:
    command.path.mkdir(mode=0o700)
    (command.path / "session.sock").mkdir()
    code, _, errors = command.run()
    assert code == 1
    assert "session.sock" in errors
