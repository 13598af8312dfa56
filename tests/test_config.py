from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcache.config import Config, environ_of, load, parse_size
from vcache.config_values import SIZE_MAX
from vcache.errors import ArgumentError, ConfigError
from vcache.limits import SEGMENT_BYTES_MIN

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def write(directory: Path, text: str) -> Path:
    path = directory / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message(*args: object, **kwargs: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*args, **{"environ": {}, **kwargs})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What holds without and with sources


def test_defaults_are_what_the_constructor_gives() -> None:
    loaded = load(environ={})
    assert loaded.config == Config()
    assert set(loaded.origin.values()) == {"default"}


def test_each_source_overrides_the_weaker_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "client: {request_timeout_ms: 1, connect_timeout_ms: 1, declare_interval_s: 1}\n")
    environ = {"VCACHE_CLIENT_CONNECT_TIMEOUT_MS": "2", "VCACHE_CLIENT_DECLARE_INTERVAL_S": "2"}
    loaded = load(path, environ=environ, client={"declare_interval_s": 3})
    client = loaded.config.client
    assert (client.request_timeout_ms, client.connect_timeout_ms, client.declare_interval_s) == (1, 2, 3)
    assert loaded.origin["client.request_timeout_ms"] == f"file {path}"
    assert loaded.origin["client.connect_timeout_ms"] == "env VCACHE_CLIENT_CONNECT_TIMEOUT_MS"
    assert loaded.origin["client.declare_interval_s"] == "argument"
    assert loaded.origin["server.policy"] == "default"


def test_the_environment_names_the_file_unless_an_argument_does(tmp_path: Path) -> None:
    path = write(tmp_path, "log: {level: error}")
    other = tmp_path / "other.yaml"
    other.write_text("log: {level: debug}")
    assert load(environ={"VCACHE_CONFIG": str(path)}).config.log.level == "error"
    assert load(other, environ={"VCACHE_CONFIG": str(path)}).config.log.level == "debug"


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCACHE_LOG_LEVEL", "DEBUG")
    assert load().config.log.level == "debug"


def test_a_frozen_configuration_does_not_change() -> None:
    config = load(environ={}).config
    with pytest.raises(AttributeError):
        config.server.policy = "s3fifo"  # type: ignore[misc]


def test_describe_lists_every_field_once_with_its_origin() -> None:
    rows = load(environ={"VCACHE_LOG_LEVEL": "error"}).describe()
    assert len({row.name for row in rows}) == len(rows)
    assert ("log.level", "error", "env VCACHE_LOG_LEVEL") in rows
    assert ("segment.size", "auto", "default") in rows


def test_variables_are_distinct() -> None:
    assert len(environ_of(Config())) == len(load(environ={}).describe())


def test_a_child_process_loads_the_same_from_the_environment() -> None:
    config = load(
        environ={},
        runtime_dir="/run/vcache",
        device="cuda:1",
        server={"autostart": False, "idle_exit_s": 0.5, "pinned_bytes_max": "3MiB", "group": "kv"},
        segment={"size": 0, "numa": 1},
        log={"file": "/tmp/with space"},
    ).config
    assert load(environ=environ_of(config)).config == config


def test_arguments_may_be_dotted() -> None:
    assert load(environ={}, **{"log.level": "error", "device": "shm:3"}).config.log.level == "error"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_each_shipped_configuration_loads(path: Path) -> None:
    assert f"file {path}" in load(path, environ={}).origin.values()


def test_there_are_shipped_configurations() -> None:
    assert {path.name for path in CONFIGS} >= {"local.yaml", "gpu.yaml"}


def test_loading_needs_no_torch_and_no_yaml_without_a_file() -> None:
    heavy = {"torch", "numpy", "yaml"}
    code = f"import sys, vcache.config as c; c.load(environ={{}}); sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What may be written


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("VCACHE_SERVER_AUTOSTART", "false", "server.autostart", False),
        ("VCACHE_SERVER_AUTOSTART", "1", "server.autostart", True),
        ("VCACHE_SERVER_IDLE_EXIT_S", "1.5", "server.idle_exit_s", 1.5),
        ("VCACHE_SEGMENT_SIZE", "2GiB", "segment.size", 2 << 30),
        ("VCACHE_SEGMENT_SIZE", "65536", "segment.size", 65536),
        ("VCACHE_SEGMENT_SIZE", "AUTO", "segment.size", "auto"),
        ("VCACHE_SEGMENT_NUMA", "1", "segment.numa", 1),
        ("VCACHE_SEGMENT_NUMA", "none", "segment.numa", None),
        ("VCACHE_LOG_FILE", "", "log.file", None),
        ("VCACHE_RUNTIME_DIR", "5", "runtime_dir", "5"),
        ("VCACHE_DEVICE", "cuda:1", "device", "cuda:1"),
    ],
)
def test_variables(variable: str, text: str, name: str, value: object) -> None:
    rows = {row.name: row.value for row in load(environ={variable: text}).describe()}
    assert rows[name] == value
    assert type(rows[name]) is type(value)


@pytest.mark.parametrize("text", ["", "# nothing\n", "server:\n  # policy: lru\n", "log: {file: null}"])
def test_files_that_say_nothing(tmp_path: Path, text: str) -> None:
    assert load(write(tmp_path, text), environ={}).config == Config()


def test_a_path_is_text() -> None:
    assert load(environ={}, runtime_dir=Path("/run/x")).config.runtime_dir == "/run/x"


# What is refused, and in which words


@pytest.mark.parametrize(
    ("variable", "text", "wanted"),
    [
        ("VCACHE_CLIENT_REQUEST_TIMEOUT_MS", "abc", "an integer >= 1 and <= 600000 (milliseconds)"),
        ("VCACHE_CLIENT_REQUEST_TIMEOUT_MS", "0", "an integer >= 1 and <= 600000 (milliseconds)"),
        ("VCACHE_SERVER_IDLE_EXIT_S", "inf", "a number >= 0 and <= 31536000 (seconds)"),
        ("VCACHE_SERVER_IDLE_EXIT_S", "nan", "a number >= 0 and <= 31536000 (seconds)"),
        ("VCACHE_SERVER_AUTOSTART", "maybe", "true or false"),
        ("VCACHE_SERVER_POLICY", "fifo", "'lru' or 's3fifo'"),
        ("VCACHE_SEGMENT_NUMA", "x", "an integer >= 0 and <= 1023 or none"),
        ("VCACHE_DEVICE", "gpu:0", "a device such as 'shm:0' or 'cuda:0'"),
        ("VCACHE_DEVICE", "shm:0\n", "a device such as 'shm:0' or 'cuda:0'"),
    ],
)
def test_a_wrong_variable(variable: str, text: str, wanted: str) -> None:
    name = variable.removeprefix("VCACHE_").lower()
    name = name if name == "device" else name.replace("_", ".", 1)
    assert message(environ={variable: text}) == f"{name} (from {variable}): got {text!r}, wanted {wanted}"


@pytest.mark.parametrize("name", ["runtime_dir", "tiers.rocksdb.directory", "log.file"])
@pytest.mark.parametrize("text", ["", "\0", "/tmp/a\0b", "/tmp/a\0"])
def test_text_that_no_system_call_takes(name: str, text: str) -> None:
    wanted = "text that is not empty and has no NUL character or none"
    assert message(**{name: text}) == f"{name} (from argument): got {text!r}, wanted {wanted}"


@pytest.mark.parametrize("size", [1, "1", SEGMENT_BYTES_MIN - 1, "4KiB"])
def test_a_segment_in_which_nothing_fits(size: int | str) -> None:
    said = message(segment={"size": size})
    assert said.startswith(f"segment.size (from argument): got {size!r}, wanted a number of bytes such as")
    assert said.endswith(", 0 or at least 8KiB, or 'auto'")
    assert load(environ={}, **{"segment.size": "8KiB"}).config.segment.size == SEGMENT_BYTES_MIN


def test_a_wrong_size_says_what_a_size_is() -> None:
    said = message(segment={"size": "2G"})
    assert said.startswith("segment.size (from argument): got '2G', wanted a number of bytes such as")
    assert "'2GiB'" in said
    assert "'auto'" in said


@pytest.mark.parametrize("value", ["5", True, 1.5, None, [5], {"a": 5}])
def test_types_are_not_guessed_outside_the_environment(value: object) -> None:
    assert message(client={"request_timeout_ms": value}) == (
        f"client.request_timeout_ms (from argument): got {value!r}, "
        "wanted an integer >= 1 and <= 600000 (milliseconds)"
    )


def test_unknown_fields(tmp_path: Path) -> None:
    path = write(tmp_path, "server: {polcy: lru}")
    assert message(path) == f"server.polcy (from {path}): unknown field; did you mean 'policy'?"
    assert message(sever={}) == "sever (from argument): unknown field; did you mean 'server'?"
    assert message(**{"segmnt.size": 1}).endswith("unknown field; did you mean 'segment'?")
    assert (
        message(log={"zzz": 1}) == "log.zzz (from argument): unknown field; wanted one of level, format, file"
    )
    assert message(environ={"VCACHE_SERVER_POLCY": "lru"}) == (
        "VCACHE_SERVER_POLCY: unknown variable; did you mean 'VCACHE_SERVER_POLICY'?"
    )


def test_a_wrong_value_in_a_file_is_refused_even_if_it_is_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, "log: {level: loud}")
    assert f"log.level (from {path}): got 'loud'" in message(path, environ={"VCACHE_LOG_LEVEL": "info"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("server: {policy: lru, policy: s3fifo}", "line 1: 'policy' is given twice, wanted once"),
        ("device: shm:0\ndevice: shm:1\n", "line 2: 'device' is given twice, wanted once"),
        ("server.policy: lru\nserver: {policy: lru}", "server.policy"),
        ("[1, 2]", "got a list, wanted a mapping"),
        ("just text", "got a str, wanted a mapping"),
        ("server: [", "not YAML"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
        ("server: !!python/object/apply:os.getcwd []", "not YAML"),
        ("server: 5", "server (from "),
        ("5: 6", "5 (from "),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    assert str(path) in message(path)
    assert said in message(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert message(missing).startswith(f"{missing}: cannot be read")
    assert message(environ={"VCACHE_CONFIG": str(missing)}).startswith(
        f"{missing} (from VCACHE_CONFIG): cannot be"
    )
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert message(binary).startswith(f"{binary}: cannot be read")


def test_a_long_value_is_shown_in_part() -> None:
    assert len(message(log={"level": "x" * 10_000})) < 400


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (7, 7),
        ("7", 7),
        ("7B", 7),
        ("2KiB", 2048),
        ("2 kb", 2000),
        ("1.5 GiB", 3 << 29),
        (" 1TiB ", 1 << 40),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "2G", "2Gi", "-1", "1e3", "0.3B", "1,5GiB", "٣", "99999999TiB", -1, True, 1.5, None]
)
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ArgumentError, match="wanted a number of bytes such as"):
        parse_size(text)  # type: ignore[arg-type]


@given(st.integers(0, 1 << 20), st.sampled_from(["KiB", "MiB", "GiB", "TiB"]))
def test_sizes_are_exact(count: int, unit: str) -> None:
    power = ["KiB", "MiB", "GiB", "TiB"].index(unit) + 1
    assert parse_size(f"{count}{unit}") == count << 10 * power


@given(st.text())
def test_any_text_is_a_size_or_refused(text: str) -> None:
    with contextlib.suppress(ArgumentError):
        assert 0 <= parse_size(text) <= SIZE_MAX


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
def test_any_argument_is_taken_or_refused_by_name(value: object) -> None:
    for name in ("device", "server.policy", "server.idle_exit_s", "segment.size", "segment.numa"):
        refused = ""
        try:
            config = load(environ={}, **{name: value}).config
        except ConfigError as error:
            refused = str(error)
        assert refused.startswith(f"{name} (from argument)") or environ_of(config)


LOAD_BY_THREADS = """
import sys, threading
from vcache.config import load
sys.setswitchinterval(1e-6)
barrier = threading.Barrier(8)
threads = [threading.Thread(target=lambda: (barrier.wait(), load(environ={}))) for _ in range(8)]
for thread in threads:
    thread.start()
"""


def test_first_loads_may_be_by_threads_at_once() -> None:
    assert subprocess.run([sys.executable, "-c", LOAD_BY_THREADS], check=False).returncode == 0
