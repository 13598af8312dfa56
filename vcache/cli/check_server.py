"""The doctor's check of the metadata server: reachable, of our version, quick, with room to store in."""

from __future__ import annotations

from collections.abc import Iterator

from vcache.cli.connect import NoServer, connected
from vcache.cli.findings import Finding
from vcache.config import Config
from vcache.protocol import PROTOCOL_VERSION
from vcache.runtime import runtime_path

_SLOW_S = 0.01
"""A request takes well under a millisecond on an idle machine."""


def check_server(config: Config, *, is_ours: bool) -> Iterator[Finding]:
    """Connect as any client does. is_ours: the doctor started it, so nobody lends anything yet."""
    try:
        with connected(config, "vcache doctor") as client:
            ping_s = min(client.ping() for _ in range(5))
            statistics = client.stats()
    except NoServer as error:
        where = runtime_path(config.runtime_dir)
        yield Finding(
            check="server",
            verdict="failed",
            found=f"none runs for {where}",
            advice=f"{error.advice}; `vcache doctor --start` tests with a temporary one",
            no_server=True,
        )
        return
    pid = int(statistics.counters["pid"])
    lent = [row for row in statistics.segments if row.held]
    is_slow = ping_s > _SLOW_S
    yield Finding(
        check="server",
        verdict="warning" if is_slow else "ok",
        found=f"process {pid} answers in {ping_s * 1e3:.2f} ms, protocol version {PROTOCOL_VERSION}"
        + (" (started for this test)" if is_ours else ""),
        advice="the machine is busy, or the server is stopped now and then: see `vcache top`"
        if is_slow
        else "",
        facts={"pid": pid, "ping_s": ping_s},
    )
    if not lent and not is_ours:
        yield Finding(
            check="pool",
            verdict="warning",
            found="no segment is lent: nothing can be stored",
            advice="start an engine that lends one, or `vcache segment --device shm:0 --size 2GiB`",
        )
