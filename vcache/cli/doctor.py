"""Test what VCache needs on this machine, and say what is wrong and what to do.

Really tests: a session with the server, room in memory and in the runtime directory, a segment that a second
process maps, and on GPUs every pair. Leaves nothing behind.

With --vllm it says instead which gpu_memory_utilization vLLM can be given beside the holders.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from vcache.cli import check_machine, check_server, present
from vcache.cli.connect import server_pid
from vcache.cli.exits import Exit
from vcache.cli.findings import MARKS, Check, Finding, findings_of
from vcache.cli.invocation import Invocation
from vcache.config import Config
from vcache.errors import ArgumentError

if TYPE_CHECKING:
    from rich.console import Console


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vcache doctor`."""
    parser.add_argument(
        "--start",
        action="store_true",
        help="where no server runs, start one for the test and end it afterwards",
    )
    parser.add_argument(
        "--vllm",
        action="store_true",
        help="only say which gpu_memory_utilization fits beside the holders, for each GPU",
    )
    parser.add_argument(
        "--segment-gib",
        type=float,
        default=0.0,
        metavar="N",
        help="with --vllm: a holder of N GiB is still to be started on each GPU",
    )


def run(invocation: Invocation) -> int:
    """Run every check, print what it found at once, and judge."""
    config, options = invocation.observing(), invocation.options
    if not 0 <= options.segment_gib < float("inf"):
        raise ArgumentError("--segment-gib", options.segment_gib, "a number of GiB of 0 or more")
    if options.segment_gib and not options.vllm:
        raise ArgumentError("--segment-gib", options.segment_gib, "--vllm beside it")
    found: list[Finding] = []
    show = _shown_to_people(present.console()) if not invocation.as_json else lambda _: None
    with check_machine.nothing_left_behind(config):
        checks = _vllm(config, options.segment_gib) if options.vllm else _examine(config, options.start)
        for finding in checks:
            found.append(finding)
            show(finding)
    code = _exit(found)
    if invocation.as_json:
        present.write_json({"ok": code == Exit.OK, "findings": found})
    else:
        _print_end(present.console(), found)
    return code


def _examine(config: Config, is_to_start: bool) -> Iterator[Finding]:
    """What all checks find, one after the other."""
    yield from findings_of("kernel", check_machine.check_kernel)
    yield from findings_of("runtime directory", lambda: check_machine.check_runtime_dir(config))
    yield from findings_of("server", lambda: _server(config, is_to_start=is_to_start))
    yield from findings_of("memory", lambda: check_machine.check_memory(config))
    for name, check in _segment_checks(config):
        yield from findings_of(name, check)


def _vllm(config: Config, segment_gib: float) -> Iterator[Finding]:
    """What is asked by --vllm, and nothing else."""
    from vcache.cli import check_vllm

    yield from findings_of("vLLM", lambda: check_vllm.check_vllm(config, segment_gib))


def _server(config: Config, *, is_to_start: bool) -> Iterator[Finding]:
    from vcache.bench.private_server import private_server
    from vcache.runtime import runtime_path

    with ExitStack() as stack:
        is_ours = is_to_start and server_pid(config) is None
        if is_ours:
            stack.enter_context(private_server(runtime_path(config.runtime_dir), config))
        yield from check_server.check_server(config, is_ours=is_ours)


def _segment_checks(config: Config) -> list[tuple[str, Check]]:
    from vcache.cli import check_segments  # numpy and, when they run, torch

    return [
        ("shared memory", lambda: check_segments.check_shared_memory(config)),
        ("GPU", lambda: check_segments.check_gpus(config)),
    ]


def _exit(found: list[Finding]) -> Exit:
    """NO_SERVER only if everything else is well: that is mended by starting one."""
    failed = [each for each in found if each.verdict == "failed"]
    if not failed:
        return Exit.OK
    return Exit.NO_SERVER if all(each.no_server for each in failed) else Exit.FAILED


def _shown_to_people(console: Console) -> Callable[[Finding], None]:
    def show(finding: Finding) -> None:
        sign, style = MARKS[finding.verdict]
        head = present.text(f"{sign} {finding.check}: ", style)
        console.print(head + present.text(finding.found), soft_wrap=True)
        if finding.advice:
            console.print(present.text(f"    {finding.advice}"), soft_wrap=True)

    return show


def _print_end(console: Console, found: list[Finding]) -> None:
    from vcache.cli.check_segments import pair_table

    for finding in found:
        pairs = finding.facts.get("pairs")
        if isinstance(pairs, list):
            console.print(pair_table(pairs))
    failed = sum(each.verdict == "failed" for each in found)
    warned = sum(each.verdict == "warning" for each in found)
    counted = present.counted(warned, "warning"), present.counted(len(found), "check")
    console.print(present.text(f"{failed} failed, {', '.join(counted)}"))
