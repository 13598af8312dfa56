"""Logging: one line per event, as text for people or JSON for machines.

    log = logging.getLogger(__name__)
    log.warning(Line("segment lost", segment=3, session=7))

`Line` keeps the fields apart until a handler asks. Ours print them as key=value or as JSON members, any
other handler (an application's, or Python's last resort) prints the message and key=value behind it.

A library does not set up logging: the commands call `configure`, nothing else does. Without it, warnings
reach standard error by Python's last resort and the rest is silent. The root logger is never touched.
"""

from __future__ import annotations

import json
import logging
import math
from datetime import datetime, timezone
from logging.handlers import WatchedFileHandler
from typing import Final

from vcache.errors import ConfigError

LOGGERS: Final = ("vcache", "metadata_server")
"""The loggers that are ours. `integration` logs below "vcache.integration", so it needs none of its own."""

_MEMBERS: Final = frozenset({"time", "level", "logger", "pid", "message", "exception"})


class Line:
    """A message and its fields, passed to a logger in the place of a format string."""

    __slots__ = ("fields", "message")

    def __init__(self, message: str, /, **fields: object) -> None:
        self.message = message
        self.fields = fields

    def __str__(self) -> str:
        return " ".join([self.message, *(f"{name}={_text(value)}" for name, value in self.fields.items())])


def configure(level: str = "info", format: str = "text", file: str | None = None) -> None:
    """Send our loggers' lines to `file`, or to standard error; a second call replaces the first.

    The arguments are `vcache.config.LogConfig`'s. Raises `ConfigError` for a file that cannot be opened.
    """
    handler: logging.Handler
    try:
        handler = WatchedFileHandler(file, encoding="utf-8") if file else logging.StreamHandler()
    except OSError as error:
        raise ConfigError(
            f"log.file: got {file!r}, wanted a file that can be written: {error.strerror}"
        ) from error
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    unconfigure()
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level.upper())
        logger.propagate = False  # a root handler of the application would print every line twice
    _configured.append(handler)


def unconfigure() -> None:
    """Undo `configure`."""
    while _configured:
        handler = _configured.pop()
        for name in LOGGERS:
            logger = logging.getLogger(name)
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)
            logger.propagate = True
        handler.close()


_configured: list[logging.Handler] = []


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z WARNING vcache.segment: segment lost segment=3`; tracebacks indented."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"{_time(record)} {record.levelname} {record.name}: {_one_line(record.getMessage())}"
        trace = _traceback(self, record)
        return text + "".join(f"\n    {each}" for each in trace.splitlines())


class JsonFormatter(logging.Formatter):
    """One JSON value a line: time, level, logger, pid, message, the fields, and exception if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        said = record.msg
        fields = said.fields if isinstance(said, Line) else {}
        members: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": said.message if isinstance(said, Line) else record.getMessage(),
        }
        members |= {f"{name}_" if name in _MEMBERS else name: _json(value) for name, value in fields.items()}
        trace = _traceback(self, record)
        return json.dumps(members | ({"exception": trace} if trace else {}), default=str)


def _time(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, timezone.utc)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""


def _one_line(text: str) -> str:
    """`text` without line breaks and other controls: what a peer sent cannot forge a line of ours."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _text(value: object) -> str:
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if text and text.isprintable() and not set(text) & set(' "=') else json.dumps(text)


def _json(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
