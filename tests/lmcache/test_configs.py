"""Every file in configs/lmcache, with LMCache's own loader; and LMCache's own checks, with our backend really
loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lmcache import engine
from tests.processes.pool import ROOT, Pool

CONFIGS = ROOT / "configs" / "lmcache"
POSITIONS = ["primary", "beside", "staged"]

pytestmark = pytest.mark.contract


def test_there_is_a_file_for_each_position_and_no_other() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == sorted(POSITIONS)
    assert [path.name for path in CONFIGS.glob("*.json")] == ["multiprocess.json"]


def position(child: Any, path: str) -> list[str]:
    """What LMCache makes of a file: the backends that it builds, and our position."""
    from types import SimpleNamespace

    import torch
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.event_manager import EventManager
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.storage_backend.storage_manager import StorageManager

    config = LMCacheEngineConfig.from_file(path)
    metadata = LMCacheMetadata("m", 1, 1, 0, 0, torch.bfloat16, (2, 2, 256, 2, 8))
    manager = StorageManager(config, metadata, EventManager(), SimpleNamespace())
    backend = manager.storage_backends[config.storage_plugins[0]]
    allocator = manager.allocator_backend
    found = [backend.position.value, type(allocator).__name__]
    manager.close()
    return found


@pytest.mark.parametrize("name", POSITIONS)
def test_lmcache_loads_it(pool: Pool, name: str) -> None:
    worker = pool.start_worker()
    path = _small(pool, name)
    allocator = "VCacheStorageBackend" if name == "primary" else "LocalCPUBackend"
    worker.call("run", _no_controller)
    assert worker.call("run", position, str(path)) == [name, allocator]


def _no_controller(child: Any) -> None:
    os.environ["LMCACHE_TRACK_USAGE"] = "false"


def _small(pool: Pool, name: str) -> Path:
    """The file as it is, but for the test's pool and with little CPU memory."""
    given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    if given["max_local_cpu_size"]:
        given["max_local_cpu_size"] = 0.05
    client = {f"vcache.{field}": value for field, value in pool.client_config().items()}
    given["extra_config"] = {**given["extra_config"], **client, "vcache.segment.size": "16MiB"}
    path = pool.path.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


def _basic_check(pool: Pool, *options: str, **environment: str) -> str:
    command = [sys.executable, "-m", "lmcache.v1.basic_check", "--num-keys", "20", *options]
    environment = {**pool.environment(), "LMCACHE_TRACK_USAGE": "false", **environment}
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=100
    )
    output = ran.stdout + ran.stderr
    assert ran.returncode == 0, output
    return output


@pytest.mark.parametrize("name", POSITIONS)
def test_lmcaches_own_check_of_the_storage_manager(pool: Pool, name: str) -> None:
    before = pool.counters()
    output = _basic_check(pool, "--mode", "test_storage_manager", LMCACHE_CONFIG_FILE=str(_small(pool, name)))
    # It passes even where the plugin did not load.
    assert "Failed to create backend" not in output
    assert "(VCacheStorageBackend)" in output
    assert "Validation (content correct): 20/20" in output, output
    assert output.count("100.0%") >= 4 and "Failed" not in output, output
    assert pool.counters()["committed"] >= before.get("committed", 0) + 20
    pool.assert_nothing_leaks()


def test_lmcaches_own_check_of_the_l2_adapter(pool: Pool) -> None:
    adapter = json.loads((CONFIGS / "multiprocess.json").read_text())
    client = {f"vcache.{field}": value for field, value in pool.client_config().items()}
    adapter["adapter_params"] = {**adapter["adapter_params"], **client, "vcache.segment.size": "16MiB"}
    output = _basic_check(pool, "--mode", "test_l2_adapter", "--l2-adapter", json.dumps(adapter))
    assert "(VCacheL2Adapter)" in output
    assert "Validation (content): 20/20" in output, output
    assert pool.counters()["committed"] >= 20
    pool.assert_nothing_leaks()


def differing(child: Any) -> None:
    """From now on vLLM's hash functions are to be had in this process: what LMCache looks for them by."""
    import hashlib
    import pickle
    import types

    module = types.ModuleType("vllm.utils.hashing")
    vars(module)["get_hash_fn_by_name"] = lambda _: lambda given: hashlib.sha256(pickle.dumps(given)).digest()
    sys.modules.update({"vllm": types.ModuleType("vllm"), "vllm.utils": types.ModuleType("vllm.utils")})
    sys.modules["vllm.utils.hashing"] = module


def logged(child: Any) -> list[str]:
    return list(child.kept["log"])


def listen(child: Any) -> None:
    import logging

    child.kept["log"] = lines = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(str(record.getMessage()))

    logging.getLogger("vcache.integration.lmcache").addHandler(Handler())


def test_engines_that_hash_differently_are_both_warned(pool: Pool) -> None:
    workers = []
    for number in range(2):
        worker = pool.start_worker()
        workers.append(worker)
        worker.call("run", listen)
        if number:
            worker.call("run", differing)
        path = pool.path.parent / f"lmcache-{number}.yaml"
        path.write_text(yaml.safe_dump(engine.config_of(pool, "primary", size="1MiB")))
        worker.call("run", engine.open_engine, str(path), {}, None)
    for worker in workers:
        pool.eventually(
            lambda _, worker=worker: any(
                "hashes tokens differently" in line for line in worker.call("run", logged)
            ),
            "the warning",
        )
        warnings = [line for line in worker.call("run", logged) if "hashes tokens differently" in line]
        assert len(warnings) == 1
        assert "pre_caching_hash_algorithm" in warnings[0] and "PYTHONHASHSEED" in warnings[0]
