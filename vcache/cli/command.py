"""The parser of `vcache`, and what becomes of a command's errors: one line for people, an exit code for
scripts.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol, cast

from vcache import __version__, logs
from vcache.cli.exits import EXPLAINED, Exit, exit_of
from vcache.cli.invocation import Invocation, common_options, invocation_of
from vcache.errors import VCacheError

COMMANDS: Final = {
    "segment": "hold a segment and lend it to the pool until ended",
    "stats": "show the server's counters, segments and sessions",
    "list": "list the chunks in the pool",
    "config": "show the effective configuration and where each value came from",
    "clear": "forget all chunks, or those of one model",
    "tier": "show, verify or empty the lower tiers",
    "mooncake": "run a Mooncake Store on this machine, for development",
    "doctor": "test what VCache needs on this machine, and say what is wrong",
    "top": "watch segments, fill, hit rate and requests per second",
    "bench": "measure copies and requests on this machine",
}

_QUIET: Final = "critical"


class _Command(Protocol):
    """What the module of a command has. It imports what is heavy only when it runs."""

    __doc__: str | None
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Invocation], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors are one line on standard error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    invocation: Invocation | None = None
    try:
        command, options = _parse(given)
        invocation = invocation_of(options)
        _configure_logs(invocation)
        with _ended_in_order():
            code = command.run(invocation)
        sys.stdout.flush()
        return int(code)
    except BrokenPipeError:
        # Whoever read us has seen enough (`vcache list | head`); Python would complain when it flushes at
        # exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except Exception as error:
        if invocation is not None and invocation.config.log.level == "debug":
            traceback.print_exc()
        print(f"vcache: {_in_words(error)}", file=sys.stderr)
        return exit_of(error)


def _parse(given: list[str]) -> tuple[_Command, argparse.Namespace]:
    """The command's module and all options. Only the module of the command that is asked for is imported."""
    parser = _parser()
    options = parser.parse_args(given)
    if options.command is None:
        parser.print_help(sys.stderr)
        raise SystemExit(int(Exit.USAGE))
    command = cast(_Command, importlib.import_module(f"vcache.cli.{options.command}"))
    own = argparse.ArgumentParser(
        prog=f"vcache {options.command}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common_options()],
    )
    command.arguments(own)
    rest = options.arguments
    del options.arguments
    return command, own.parse_args(rest, namespace=options)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    codes = "\n".join(f"  {code:>3}  {what}" for code, what in EXPLAINED.items())
    parser = argparse.ArgumentParser(
        prog="vcache",
        usage="vcache [options] COMMAND [options]",
        description="VCache: a node's GPU memory as one pool of KV cache.",
        epilog=f"commands:\n{commands}\n\nvcache COMMAND --help says more.\n\nexit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common_options()],
    )
    parser.add_argument("--version", action="version", version=f"vcache {__version__}")
    parser.add_argument("command", metavar="COMMAND", nargs="?", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, through its `finally`: what it started ends with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _configure_logs(invocation: Invocation) -> None:
    """Log as configured where a command runs for long; else only if the caller asked for it here and now.

    A file of configuration is the engines': with its "level: info" every `vcache stats` would be framed by
    lines about connecting.
    """
    log, origin = invocation.config.log, invocation.loaded.origin

    def is_asked(field: str) -> bool:
        return invocation.options.command == "segment" or not origin[field].startswith(("default", "file "))

    level = log.level if is_asked("log.level") else _QUIET
    logs.configure(level, log.format, log.file if is_asked("log.file") else None)


def _in_words(error: Exception) -> str:
    """One line. What is no error of ours is a mistake of ours, and is said to be one."""
    text = " ".join(str(error).split())
    if isinstance(error, VCacheError):
        return text
    if isinstance(error, OSError):
        return text or type(error).__name__
    return f"internal error: {type(error).__name__}: {text} (--log-level debug shows where)"
