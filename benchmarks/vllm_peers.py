"""vLLM servers with the KV connectors that VCache is compared with."""

from __future__ import annotations

import json
import time
from pathlib import Path

from benchmarks.vllm_servers import Folder, free_port, has_module, program


def example(where: Folder, model: Path, cores: str) -> int:
    """vLLM's own example: a file for each prompt and layer, here in memory."""
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(where.path / "kv")},
    }
    return where.start_vllm(model, cores, transfer)


def lmcache(where: Folder, model: Path, cores: str) -> int:
    """LMCache's server in a process of its own; the engine copies."""
    command = program("lmcache")
    if command is None:
        raise RuntimeError("lmcache is not installed")
    port, http = free_port(), free_port()
    serving = ["server", "--host", "127.0.0.1", "--port", str(port), "--http-port", str(http)]
    sizes = ["--l1-size-gb", "3", "--chunk-size", "64", "--eviction-policy", "LRU"]
    where.run([command, *serving, *sizes, "--supported-transfer-mode", "engine_driven"])
    transfer = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
    }
    return where.start_vllm(model, cores, transfer)


def mooncake(where: Folder, model: Path, cores: str) -> int:
    """Mooncake's master and a store of its own, by TCP on this machine."""
    master, client = program("mooncake_master"), program("mooncake_client")
    if master is None or client is None or not has_module("mooncake"):
        raise RuntimeError("mooncake is not installed (mooncake-transfer-engine-non-cuda)")
    port = free_port()
    address = f"127.0.0.1:{port}"
    where.run([master, "--port", str(port)])
    time.sleep(2)
    lending = ["--host", "127.0.0.1", "--global_segment_size", "3GB", "--metadata_server", "P2PHANDSHAKE"]
    where.run([client, *lending, "--master_server_address", address, "--protocol", "tcp"])
    time.sleep(2)
    config = where.path / "mooncake.json"
    said = {
        "mode": "standalone-store",
        "metadata_server": "P2PHANDSHAKE",
        "protocol": "tcp",
        "device_name": "",
        "master_server_address": address,
        "global_segment_size": 0,
        "local_buffer_size": 1 << 30,
    }
    config.write_text(json.dumps(said))
    transfer = {"kv_connector": "MooncakeStoreConnector", "kv_role": "kv_both"}
    return where.start_vllm(model, cores, transfer, environ={"MOONCAKE_CONFIG_PATH": str(config)})


PEERS = {
    "ExampleConnector": example,
    "LMCacheMPConnector": lmcache,
    "MooncakeStoreConnector": mooncake,
}
"""How each is started. Raises RuntimeError if what it needs is not installed."""
