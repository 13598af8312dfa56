from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vcache.errors import ConfigError
from vcache.logs import Line, configure, unconfigure

log = logging.getLogger("vcache.test")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    unconfigure()


def members(text: str) -> dict[str, object]:
    assert text.count("\n") == 1
    value = json.loads(text)
    assert isinstance(value, dict)
    return value


def test_text_is_one_line_with_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    log.warning(Line("segment lost", segment=3, key=b"\x01\xff", why="no room", empty=""))
    time, rest = capsys.readouterr().err.split(" ", 1)
    assert time.endswith("Z")
    assert rest == 'WARNING vcache.test: segment lost segment=3 key=01ff why="no room" empty=""\n'


def test_json_is_one_value_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="json")
    log.info(Line("lost", segment=3, key=b"\xff", rate=float("nan"), of=Path("/x"), level="mine"))
    value = members(capsys.readouterr().err)
    assert value["message"] == "lost"
    assert value["level"] == "info"
    assert value["logger"] == "vcache.test"
    assert value["segment"] == 3
    assert value["key"] == "ff"
    assert value["rate"] == "nan"
    assert value["of"] == "/x"
    assert value["level_"] == "mine"


def test_plain_messages_work_too(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="json")
    log.info("%d of %d", 1, 2)
    assert members(capsys.readouterr().err)["message"] == "1 of 2"


@pytest.mark.parametrize("format", ["text", "json"])
def test_no_message_can_forge_a_line(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure(format=format)
    log.info(Line("a\nb\r\x1b[31m\u2028", name="c\nd", other="e\u2028f"))
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text


@pytest.mark.parametrize("format", ["text", "json"])
def test_an_exception_comes_with_its_traceback(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure(format=format)
    try:
        raise ValueError("why")
    except ValueError:
        log.exception(Line("failed", step=1))
    text = capsys.readouterr().err
    assert "ValueError: why" in text
    if format == "json":
        assert "ValueError: why" in str(members(text)["exception"])
    else:
        assert all(line.startswith("    ") for line in text.splitlines()[1:])


def test_the_level_counts_for_both_loggers(capsys: pytest.CaptureFixture[str]) -> None:
    configure("error")
    log.warning("hidden")
    logging.getLogger("metadata_server.test").error("shown")
    assert capsys.readouterr().err.count("\n") == 1


def test_configuring_again_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    configure(file=str(tmp_path / "x.log"))
    log.info("once")
    assert capsys.readouterr().err == ""
    assert (tmp_path / "x.log").read_text().count("once") == 1


def test_a_rotated_file_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    configure(file=str(path))
    log.info("one")
    path.rename(tmp_path / "x.log.1")
    log.info("two")
    assert "two" in path.read_text()
    assert "two" not in (tmp_path / "x.log.1").read_text()


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"log\.file: got .*, wanted a file that can be written"):
        configure(file=str(tmp_path / "missing" / "x.log"))


def test_the_root_logger_is_left_alone() -> None:
    before = (list(logging.root.handlers), logging.root.level)
    configure("debug")
    assert (logging.root.handlers, logging.root.level) == before


def test_other_handlers_see_the_fields(caplog: pytest.LogCaptureFixture) -> None:
    log.warning(Line("lost", segment=3))
    assert caplog.messages == ["lost segment=3"]


def test_a_library_is_silent_but_for_warnings() -> None:
    code = (
        "import logging, vcache.logs as l; g = logging.getLogger('vcache.x');"
        "g.info(l.Line('hidden')); g.warning(l.Line('seen', n=1))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "seen n=1\n")
