"""`python -m benchmarks.vllm_ttft`: time to the first token with VCache, beside vLLM's own prefix cache and
peers.

All servers are started the same way and bound to the same cores, the baseline among them; models have random
weights; every prompt is asked of a warm server, and is new to it. One run measures everything. To be run in
the environment that `make test-vllm` makes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.vllm_servers import (
    BLOCK_TOKENS,
    Folder,
    folder,
    forget,
    free_port,
    has_module,
    metric,
    program,
)
from demo.processes import DemoFailed
from demo.random_model import VOCABULARY, make_model
from demo.vllm_client import complete

LENGTHS = (512, 1024, 2048, 3000)
MODELS = {"GQA4": 4, "MHA16": 16}
WARM_UP = 4
CHATS, TURNS, TURN_TOKENS, ANSWER_TOKENS = 6, 4, 400, 16


@dataclass
class Figures:
    """Median seconds to the first token, by what was measured and prompt length; what was left out, why."""

    ttft_s: dict[tuple[str, int], float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def main() -> int:
    """Measure, print; 0 if the wanted bounds are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5, help="prompts of each length (5)")
    parser.add_argument("--cores", default="0-1", help="as VLLM_CPU_OMP_THREADS_BIND says them (0-1)")
    parser.add_argument("--without", nargs="*", default=[], help="of: example lmcache mooncake chat")
    options = parser.parse_args()
    console = Console(width=118)
    good = True
    with tempfile.TemporaryDirectory(prefix="vct", dir="/dev/shm") as name:
        for label in options.models:
            model = make_model(Path(name) / label, kv_heads=MODELS[label])
            good &= _measure_model(console, Path(name), label, model, options)
            shutil.rmtree(model)
    return 0 if good else 1


def _measure_model(
    console: Console, base: Path, label: str, model: Path, options: argparse.Namespace
) -> bool:
    figures = Figures()
    runs: list[tuple[str, Callable[[Folder, Path, Figures, argparse.Namespace], None]]] = [
        ("vLLM", _baseline),
        ("VCache", _vcache),
        ("example", _example),
        ("lmcache", _lmcache),
        ("mooncake", _mooncake),
    ]
    for name, run in runs:
        if name in options.without:
            continue
        console.print(f"{label}: {name}")
        try:
            with folder(base / f"{label}-{name}") as where:
                run(where, model, figures, options)
        except (DemoFailed, OSError, RuntimeError) as error:
            if name in ("vLLM", "VCache"):
                raise
            figures.left_out[name] = str(error)[-300:]
    token_bytes = 8 * 2 * MODELS[label] * 64 * 2
    good = _report(console, label, figures, token_bytes)
    if "chat" not in options.without:
        console.print(_chat(base / f"{label}-chat", model))
    return good


# -- what is measured


def _baseline(where: Folder, model: Path, figures: Figures, options: argparse.Namespace) -> None:
    port = where.start_vllm(model, options.cores)
    _warm(port)
    for length in LENGTHS:
        pairs = []
        for prompt in _prompts(1, length, options.repeats):
            cold = complete(port, prompt, max_tokens=1).ttft_s
            pairs.append((cold, _hit(port, prompt)))
        _note(figures, ("cold", "own prefix cache"), length, pairs)


def _vcache(where: Folder, model: Path, figures: Figures, options: argparse.Namespace) -> None:
    """One engine computes and stores, and ends; another one hits, in a segment that neither lent."""
    where.start_pool()
    writer = where.start_vllm(model, options.cores, where.vcache())
    _warm(writer, 98)
    cold: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for length in LENGTHS:
        for prompt in _prompts(2, length, options.repeats):
            cold[length].append(complete(writer, prompt, max_tokens=1).ttft_s)
            forget(writer)  # which waits until all is stored
    where.stop_vllm(writer)
    reader = where.start_vllm(model, options.cores, where.vcache())
    _warm(reader, 99)
    for length in LENGTHS:
        hits = [_hit(reader, prompt) for prompt in _prompts(2, length, options.repeats)]
        _note(figures, ("cold, storing", "VCache"), length, list(zip(cold[length], hits, strict=True)))


def _example(where: Folder, model: Path, figures: Figures, options: argparse.Namespace) -> None:
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(where.path / "kv")},
    }
    _peer(where.start_vllm(model, options.cores, transfer), "ExampleConnector", figures, options)


def _lmcache(where: Folder, model: Path, figures: Figures, options: argparse.Namespace) -> None:
    command = program("lmcache")
    if command is None:
        raise RuntimeError("lmcache is not installed")
    port, http = free_port(), free_port()
    serving = ["server", "--host", "127.0.0.1", "--port", str(port), "--http-port", str(http)]
    sizes = ["--l1-size-gb", "2", "--chunk-size", "64", "--eviction-policy", "LRU"]
    where.run([command, *serving, *sizes, "--supported-transfer-mode", "engine_driven"])
    transfer = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
    }
    _peer(where.start_vllm(model, options.cores, transfer), "LMCacheMPConnector", figures, options)


def _mooncake(where: Folder, model: Path, figures: Figures, options: argparse.Namespace) -> None:
    master, client = program("mooncake_master"), program("mooncake_client")
    if master is None or client is None or not has_module("mooncake"):
        raise RuntimeError("mooncake is not installed (mooncake-transfer-engine-non-cuda)")
    port = free_port()
    address = f"127.0.0.1:{port}"
    where.run([master, "--port", str(port)])
    time.sleep(2)
    lending = ["--host", "127.0.0.1", "--global_segment_size", "1GB", "--metadata_server", "P2PHANDSHAKE"]
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
    server = where.start_vllm(model, options.cores, transfer, environ={"MOONCAKE_CONFIG_PATH": str(config)})
    _peer(server, "MooncakeStoreConnector", figures, options)


def _peer(port: int, name: str, figures: Figures, options: argparse.Namespace) -> None:
    """One engine stores, forgets what it has itself, and hits."""
    _warm(port)
    for length in LENGTHS:
        pairs = []
        for prompt in _prompts(3, length, options.repeats):
            cold = complete(port, prompt, max_tokens=1).ttft_s
            time.sleep(0.5)  # its stores have no end that one could wait for
            forget(port)
            pairs.append((cold, _hit(port, prompt, whole=False)))
        _note(figures, (f"cold, {name}", name), length, pairs)


def _hit(port: int, prompt: list[int], *, whole: bool = True) -> float:
    """Ask what must be cached. Raises RuntimeError if it was not."""
    answer = complete(port, prompt, max_tokens=1)
    wanted = (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS if whole else len(prompt) // 2
    if answer.cached_tokens < wanted:
        raise RuntimeError(f"{answer.cached_tokens} of {len(prompt)} tokens were cached, wanted {wanted}")
    return answer.ttft_s


def _warm(port: int, seed: int = 99) -> None:
    for prompt in _prompts(seed, 1500, WARM_UP):
        complete(port, prompt, max_tokens=2)
        complete(port, prompt, max_tokens=2)


def _prompts(seed: int, length: int, count: int) -> list[list[int]]:
    draw = random.Random(seed * 10_000 + length)
    return [[draw.randrange(3, VOCABULARY) for _ in range(length)] for _ in range(count)]


def _note(figures: Figures, names: tuple[str, str], length: int, pairs: list[tuple[float, float]]) -> None:
    for name, seconds in zip(names, zip(*pairs, strict=True), strict=True):
        figures.ttft_s[name, length] = statistics.median(seconds)


# -- the report


def _memcpy_s(size: int) -> float:
    """The best of some copies of so many bytes, as one thread makes them."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    best = float("inf")
    for _ in range(7):
        started = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - started)
    return best


def _report(console: Console, label: str, figures: Figures, token_bytes: int) -> bool:
    table = Table("TTFT in ms", *map(str, LENGTHS), title=f"{label}, {token_bytes >> 10} KiB a token")
    names = dict.fromkeys(name for name, _ in figures.ttft_s)
    for name in names:
        cells = [figures.ttft_s.get((name, length)) for length in LENGTHS]
        table.add_row(name, *("-" if cell is None else f"{cell * 1e3:.1f}" for cell in cells))
    bounds = []
    for length in LENGTHS:
        loaded = (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS * token_bytes
        bounds.append(1.5 * _memcpy_s(loaded) + 3e-3)
    floor = [figures.ttft_s["own prefix cache", length] for length in LENGTHS]
    ours = [figures.ttft_s["VCache", length] for length in LENGTHS]
    over = [a - b for a, b in zip(ours, floor, strict=True)]
    table.add_section()
    table.add_row("VCache over the floor", *(f"{seconds * 1e3:.1f}" for seconds in over))
    table.add_row("wanted: 1.5 × memcpy + 3 ms", *(f"≤ {seconds * 1e3:.1f}" for seconds in bounds))
    storing = [figures.ttft_s["cold, storing", length] / figures.ttft_s["cold", length] for length in LENGTHS]
    table.add_row("cold, storing / cold (wanted ≤ 1.03)", *(f"{ratio:.3f}" for ratio in storing))
    console.print(table)
    for name, why in figures.left_out.items():
        console.print(f"left out: {name}: {why}", markup=False)
    peers = {name for name in names if name.endswith("Connector") and not name.startswith("cold")}
    faster = all(figures.ttft_s[peer, n] > figures.ttft_s["VCache", n] for peer in peers for n in LENGTHS)
    met = all(a <= b for a, b in zip(over, bounds, strict=True))
    console.print(f"over the floor: {'met' if met else 'missed'}; faster than each peer: {faster}")
    return met and faster and max(storing) <= 1.03


# -- throughput


def _chat(path: Path, model: Path) -> str:
    """Seconds that chats take over two engines, a core each, every turn at the other engine; without and
    with.
    """
    seconds = {}
    for name in ("without", "with"):
        with folder(Path(f"{path}-{name}")) as where:
            if name == "with":
                where.start_pool()
            transfer = where.vcache() if name == "with" else None
            ports = [where.start_vllm(model, core, transfer) for core in ("0", "1")]
            for port in ports:
                _warm(port)
            seconds[name] = _chats(ports)
            hits = sum(metric(port, "vllm:vcache_hit_tokens_total") for port in ports) if transfer else 0
    turns = CHATS * TURNS
    faster = seconds["without"] / seconds["with"]
    return (
        f"{CHATS} chats of {TURNS} turns over two engines: {turns / seconds['without']:.2f} turns/s without "
        f"VCache, {turns / seconds['with']:.2f} with it ({faster:.2f} ×, {hits:.0f} tokens hit)"
    )


def _chats(ports: list[int]) -> float:
    """Two chats at a time; turn after turn they change places."""
    draw = random.Random(7)
    histories = [[draw.randrange(3, VOCABULARY) for _ in range(TURN_TOKENS)] for _ in range(CHATS)]
    started = time.perf_counter()
    for turn in range(TURNS):
        for first in range(0, CHATS, 2):

            def ask(at: int, turn: int = turn, first: int = first) -> None:
                history = histories[first + at]
                complete(ports[(at + turn) % 2], history, max_tokens=ANSWER_TOKENS)
                extra = random.Random(1_000 * turn + first + at)
                history += [extra.randrange(3, VOCABULARY) for _ in range(TURN_TOKENS)]

            threads = [threading.Thread(target=ask, args=(at,)) for at in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
