"""`vcache mooncake up`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from tests.mooncake.store import LAYOUT, chunk, is_here, key
from tests.processes.worker import DEADLINE_S
from vcache.config import MooncakeConfig
from vcache.tiers.mooncake.master import Master
from vcache.tiers.mooncake.tier import MooncakeTier


def test_it_serves_until_it_is_ended() -> None:
    command = [
        sys.executable,
        "-m",
        "vcache.cli",
        "mooncake",
        "up",
        "--port",
        "0",
        "--size",
        "64MiB",
        "--json",
    ]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as up:
        assert up.stdout is not None
        told = json.loads(up.stdout.readline())
        tier = MooncakeTier(MooncakeConfig(master=told["master"], protocol="tcp"))
        try:
            assert tier.wait_ready(DEADLINE_S)
            assert tier.put(key(1), chunk(1), LAYOUT)
            assert is_here(tier, 1)
        finally:
            tier.close()
            up.send_signal(signal.SIGTERM)
        assert up.wait(DEADLINE_S) == 130


def test_a_port_that_is_taken_is_said() -> None:
    with Master() as master:
        command = [sys.executable, "-m", "vcache.cli", "mooncake", "up", "--port", str(master.port)]
        ran = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=60
        )
    assert ran.returncode == 3
    assert f"something else answers at {master.address}" in ran.stderr
