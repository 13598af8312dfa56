"""One run of a command: its options, the configuration that they lead to, and the options that all have."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Final

import msgspec

from vcache.config import Config, Loaded, load

PATIENCE_MS: Final = 10_000
"""A command for people waits at least this long for an answer: it has no engine to hold up, and a person who
reads "no answer" from a machine that is only busy is misled.
"""

_CONFIGURED: Final = {
    "runtime_dir": "runtime_dir",
    "log_level": "log.level",
    "log_format": "log.format",
    "log_file": "log.file",
}


@dataclass(frozen=True)
class Invocation:
    """What a command's `run` is given. as_json: print for programs, not for people."""

    options: argparse.Namespace
    loaded: Loaded
    as_json: bool

    @property
    def config(self) -> Config:
        """The effective configuration."""
        return self.loaded.config

    def observing(self) -> Config:
        """The configuration of a command that looks at a pool: patient, and never starting a server."""
        config = self.config
        patient = max(config.client.request_timeout_ms, PATIENCE_MS)
        return msgspec.structs.replace(
            config,
            server=msgspec.structs.replace(config.server, autostart=False),
            client=msgspec.structs.replace(config.client, request_timeout_ms=patient),
        )


def invocation_of(options: argparse.Namespace) -> Invocation:
    """Load the configuration that the options name. Raises ConfigError."""
    given = {field: getattr(options, name, None) for name, field in _CONFIGURED.items()}
    overrides = {field: value for field, value in given.items() if value is not None}
    loaded = load(getattr(options, "config", None), **overrides)
    return Invocation(options, loaded, getattr(options, "json", False))


def common_options() -> argparse.ArgumentParser:
    """The options of every command, for `parents`. They may stand before the command too: hence no defaults,
    which would undo what was given there.
    """
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common = parser.add_argument_group("options of every command")
    common.add_argument("--config", metavar="FILE", help="YAML configuration (default: $VCACHE_CONFIG)")
    common.add_argument("--runtime-dir", metavar="DIR", help="the pool's directory of sockets and table")
    common.add_argument("--json", action="store_true", help="print JSON, for programs")
    common.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    common.add_argument("--log-format", choices=("text", "json"))
    common.add_argument("--log-file", metavar="FILE", help="log there instead of to standard error")
    return parser
