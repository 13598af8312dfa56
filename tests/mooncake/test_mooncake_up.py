"""`vcache mooncake up`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.mooncake.store import LAYOUT, chunk, is_here, key
from tests.processes.worker import DEADLINE_S
from vcache.config import MooncakeConfig
from vcache.limits import MIB
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


def test_it_ends_with_its_master() -> None:
    command = [sys.executable, "-m", "vcache.cli", "mooncake", "up", "--port", "0", "--size", "0", "--json"]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as up:
        assert up.stdout is not None
        up.stdout.readline()
        (master,) = Path(f"/proc/{up.pid}/task/{up.pid}/children").read_text().split()
        os.kill(int(master), signal.SIGKILL)
        _, words = up.communicate(timeout=DEADLINE_S)
    assert up.returncode == 3
    assert "mooncake_master ended with -9" in words


def test_purge_empties_what_it_can_and_says_what_it_cannot(tmp_path: Path) -> None:
    """As a client that lends nothing, whatever engines are configured to lend."""
    with Master() as master:
        tier = MooncakeTier(MooncakeConfig(master=master.address, protocol="tcp", lend=64 * MIB))
        assert tier.wait_ready(DEADLINE_S)
        assert tier.put(key(1), chunk(1), LAYOUT)
        settings = {
            "VCACHE_TIERS_ORDER": "mooncake, rocksdb",
            "VCACHE_TIERS_ROCKSDB_DIRECTORY": str(tmp_path / "tier"),
            "VCACHE_TIERS_MOONCAKE_MASTER": master.address,
            "VCACHE_TIERS_MOONCAKE_PROTOCOL": "tcp",
            "VCACHE_TIERS_MOONCAKE_LEND": "512GiB",
        }

        def purge() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "vcache.cli", "tier", "purge", "--yes", "--json"],
                cwd=Path(__file__).parents[2],
                env={**os.environ, **settings},
                capture_output=True,
                text=True,
                check=False,
                timeout=DEADLINE_S,
            )

        ran = purge()
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout) == {"purged": ["mooncake", "rocksdb"], "failed": {}}
        assert not is_here(tier, 1)
        tier.close()
        master.kill()
        ran = purge()
        assert ran.returncode == 3
        assert json.loads(ran.stdout)["purged"] == ["rocksdb"]
        assert "vcache: mooncake was not purged" in ran.stderr


def test_a_port_that_is_taken_is_said() -> None:
    with Master() as master:
        command = [sys.executable, "-m", "vcache.cli", "mooncake", "up", "--port", str(master.port)]
        ran = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=60
        )
    assert ran.returncode == 3
    assert f"something else answers at {master.address}" in ran.stderr
