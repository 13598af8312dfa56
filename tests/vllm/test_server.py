"""An OpenAI-compatible server, as `vllm serve` starts it: its answers, and its metrics."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from demo.random_model import make_model
from demo.vllm_client import complete, get, healthy
from tests.vllm.harness import BLOCK, ROOT, START_S, Machine, eventually


def test_cached_tokens_and_metrics_over_http(
    machine: Machine, tmp_path: Path, unused_port: Callable[[], int]
) -> None:
    machine.start_server()
    machine.start_holder()
    model = make_model(tmp_path / "model", layers=2, hidden=128, heads=4, kv_heads=2)
    port = unused_port()
    transfer = {
        "kv_connector": "VCacheConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"segment.size": 0},
    }
    options = ["--model", str(model), "--port", str(port), "--host", "127.0.0.1", "--block-size", str(BLOCK)]
    options += ["--max-model-len", "2048", "--enforce-eager", "--prefix-caching-hash-algo", "sha256_cbor"]
    options += ["--enable-prompt-tokens-details", "--kv-transfer-config", json.dumps(transfer)]
    environ = {
        **machine.environ(),
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options],
            cwd=ROOT,
            env=environ,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        eventually(partial(_answers, process, port), "the server answers", START_S)
        text = "the same beginning " * 20
        first = complete(port, text)
        eventually(lambda: machine.chunks() >= len(text) // BLOCK, "it is stored")
        eventually(partial(_forget, port), "no block is in use")
        second = complete(port, text)
        assert first.cached_tokens == 0
        assert second.cached_tokens == (second.prompt_tokens - 1) // BLOCK * BLOCK
        assert second.text == first.text
        told = get(port, "/metrics")[1]
        hits = re.search(r"^vllm:vcache_hit_tokens_total\{.*\} (\S+)$", told, re.MULTILINE)
        assert hits is not None and float(hits[1]) == second.cached_tokens
        for name in ("loaded_bytes_total", "stored_bytes_total", "load_seconds_bucket", "store_seconds_sum"):
            assert f"vllm:vcache_{name}{{" in told
        assert re.search(r'vllm:vcache_failures_total\{cause="no_server".*\} 0.0', told)
    finally:
        process.terminate()
        process.wait(60)


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    assert process.poll() is None, "the server ended"
    return healthy(port)


def _forget(port: int) -> bool:
    """Empty the server's own prefix cache; whether it is: with blocks in use it says no, with status 200."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/reset_prefix_cache")
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status == 200 and b"false" not in body.lower()
