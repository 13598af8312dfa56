"""`python -m benchmarks.vllm_ttft`: time to the first token with VCache, beside vLLM's own prefix cache and
peers.

All servers are started the same way and bound to the same cores, the baseline among them; models have random
weights; every prompt is new to a warm server. One run measures everything, with all servers stopped but one.
A hit of a cache is compared with one of the same server's own prefix cache, right after: two servers that do
the same differ by more milliseconds than a copy takes, and so does one server within two seconds. A prompt
that VCache stores is computed by the baseline, too, right before or after. The copies that hits are measured
by are made between them. To be run in the environment that `make test-vllm` makes.
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
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.report import ROOT, commit, cpu, machine, result_path
from benchmarks.vllm_servers import (
    BLOCK_TOKENS,
    SEGMENT,
    Folder,
    folder,
    forget,
    free_port,
    has_module,
    program,
)
from demo.processes import DemoFailed
from demo.random_model import DTYPE_BYTES, VOCABULARY, fast_dtype, make_model
from demo.vllm_client import complete, metric

LENGTHS = (512, 1024, 2048, 3000)
MODELS = {"GQA4": 4, "MHA16": 16}
LAYERS, HEAD_SIZE = 8, 64
WARM_UP = 4
FLOOR_ROUNDS = 3
AWAKE_TRIES = 5
COLD_MORE = {512: 10, 1024: 6, 2048: 4, 3000: 8}
"""Prompts that are only computed and stored: a ratio of two servers needs many to be worth anything."""

BEYOND_CACHES = 256 << 20
"""Bytes; more than any processor's caches hold of what was there before."""

CHATS, TURNS, TURN_TOKENS, ANSWER_TOKENS = 6, 4, 400, 16

COLD, FLOOR, STORING, OURS = "cold", "own prefix cache", "cold, VCache storing", "VCache"

Prompts = dict[int, list[list[int]]]
"""By their length."""


@dataclass
class Figures:
    """Seconds to the first token of each measurement, by what was measured and prompt length.

    over: of what came from a cache, how much longer than the server's own prefix cache took right after it.
    ratios: of cold prompts that VCache stored, to those of the baseline. memcpy_s: of the bytes that a hit
    loads. left_out: peers, and why.
    """

    ttft_s: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    over_s: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    ratios: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    memcpy_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    left_out: dict[str, str] = field(default_factory=dict)

    def leave_out(self, name: str, why: str) -> None:
        """A peer ended before everything was measured: a part of it is no comparison."""
        for figures in (self.ttft_s, self.over_s):
            for key in [key for key in figures if name in key[0]]:
                del figures[key]
        self.left_out[name] = why

    def median_ms(self, name: str, length: int) -> float | None:
        """The median of what was measured."""
        found = self.ttft_s.get((name, length))
        return statistics.median(found) * 1e3 if found else None


def main() -> int:
    """Measure, print; 0 if the wanted bounds are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--prompts", type=int, default=2, help="of each length, to be hit (2)")
    parser.add_argument("--rounds", type=_at_least_one, default=60, help="hits of each prompt in VCache (60)")
    parser.add_argument(
        "--peer-rounds", type=_at_least_one, default=12, help="hits of each prompt elsewhere (12)"
    )
    parser.add_argument("--cores", default="0-1", help="as VLLM_CPU_OMP_THREADS_BIND says them (0-1)")
    parser.add_argument("--without", nargs="*", default=[], help="of: example lmcache mooncake chat")
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/")
    options = parser.parse_args()
    console = Console(width=118, record=True)
    console.print(machine())
    good = True
    with tempfile.TemporaryDirectory(prefix="vct", dir="/dev/shm") as name:
        for label in options.models:
            model = make_model(Path(name) / label, kv_heads=MODELS[label], layers=LAYERS)
            good &= _measure_model(console, Path(name), label, model, options)
            shutil.rmtree(model)
    if options.write:
        path = result_path(cpu(), f"vllm-{commit()}")
        path.write_text(f"# Time to the first token\n\n```\n{console.export_text()}```\n")
        print(path.relative_to(ROOT))
    return 0 if good else 1


def _at_least_one(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"got {count}, wanted at least 1")
    return count


def _measure_model(
    console: Console, base: Path, label: str, model: Path, options: argparse.Namespace
) -> bool:
    figures = Figures()
    token_bytes = LAYERS * 2 * MODELS[label] * HEAD_SIZE * DTYPE_BYTES[fast_dtype()]
    prompts = {length: _prompts(1, length, options.prompts) for length in LENGTHS}
    with folder(base / f"{label}-ttft") as where:
        console.print(f"{label}: vLLM and VCache")
        floor = where.start_vllm(model, options.cores)
        _warm(floor)
        with where.within("vcache") as inner:
            _vcache(inner, floor, model, token_bytes, prompts, figures, options)
        for name, start in (
            ("ExampleConnector", _example),
            ("LMCacheMPConnector", _lmcache),
            ("MooncakeStoreConnector", _mooncake),
        ):
            if name.lower().startswith(tuple(options.without or ["-"])):
                continue
            console.print(f"{label}: {name}")
            with where.within(name) as inner:
                try:
                    _peer(inner, start(inner, model, options), floor, name, prompts, figures, options)
                except (DemoFailed, OSError, RuntimeError, HTTPException) as error:
                    figures.leave_out(name, f"{str(error)[-300:]}\n{inner.last_words()}")
    good = _report(console, label, figures, token_bytes)
    if "chat" not in options.without:
        console.print(_chat(base / f"{label}-chat", model))
    return good


# -- what is measured


def _vcache(
    where: Folder,
    floor: int,
    model: Path,
    token_bytes: int,
    prompts: Prompts,
    figures: Figures,
    options: argparse.Namespace,
) -> None:
    """One engine computes and stores in its segment, another one hits there."""
    where.start_pool()
    writer = where.start_vllm(model, options.cores, where.vcache(SEGMENT))
    where.only(writer)
    _warm(writer, 98)
    more = {length: _prompts(2, length, count) for length, count in COLD_MORE.items()}
    for length, turn, prompt in _each(more) + _each(prompts):
        asked: list[tuple[str, int]] = [(COLD, floor), (STORING, writer)]
        seconds = {}
        for name, port in asked if turn % 2 else asked[::-1]:
            where.only(port)
            seconds[name] = complete(port, prompt, max_tokens=1).ttft_s
            figures.ttft_s[name, length].append(seconds[name])
        where.only(writer)
        forget(writer)  # which waits until all is stored
        figures.ratios[length].append(seconds[STORING] / seconds[COLD])
    reader = where.start_vllm(model, options.cores, where.vcache())
    where.only(reader)
    _warm(reader, 99)
    rounds = options.rounds
    while rounds:
        some = min(rounds, options.peer_rounds)
        _hits(where, floor, reader, OURS, prompts, figures, some)
        rounds -= some
        where.stop_all()
        for length in LENGTHS:
            figures.memcpy_s[length].append(_memcpy_s(_cached_tokens(length) * token_bytes))


def _peer(
    where: Folder,
    port: int,
    floor: int,
    name: str,
    prompts: Prompts,
    figures: Figures,
    options: argparse.Namespace,
) -> None:
    """One engine stores, forgets what it has itself, and hits."""
    where.only(port)
    _warm(port)
    for length, _, prompt in _each(prompts):
        figures.ttft_s[f"cold, {name}", length].append(complete(port, prompt, max_tokens=1).ttft_s)
        time.sleep(0.5)  # its stores have no end that one could wait for
    forget(port)
    _hits(where, floor, port, name, prompts, figures, options.peer_rounds)


def _hits(
    where: Folder, floor: int, port: int, name: str, prompts: Prompts, figures: Figures, rounds: int
) -> None:
    """All prompts at the baseline, which has them itself. Then in each round: each prompt at a server that
    gets it from its cache; and there once more, for now it has it itself. Before each a few tokens are
    computed, with all of the model's weights: what was in the processor's caches is not there any more.
    """
    whole, own = name == OURS, f"{name}, own prefix cache"
    where.only(floor)
    for number in range(FLOOR_ROUNDS + 1):
        for length, _, prompt in _each(prompts):
            seconds = _second(floor, prompt, number, whole=True)
            if number:  # it warms up
                figures.ttft_s[FLOOR, length].append(seconds)
    where.only(port)
    _awaken(port, prompts[LENGTHS[0]][0], whole=whole)
    for number in range(rounds + 1):
        forget(port)
        for length, _, prompt in _each(prompts):
            hit = _second(port, prompt, number, whole=whole)
            again = _second(port, prompt, number, whole=True)
            if number:
                figures.ttft_s[name, length].append(hit)
                figures.ttft_s[own, length].append(again)
                figures.over_s[name, length].append(hit - again)


def _awaken(port: int, prompt: list[int], *, whole: bool) -> None:
    """Have a server that was stopped hit again, whose connections may have to begin anew."""
    for _ in range(AWAKE_TRIES):
        forget(port)
        with suppress(RuntimeError):
            _hit(port, prompt, whole=whole)
            break


def _second(port: int, prompt: list[int], number: int, *, whole: bool) -> float:
    """A hit, after a few tokens."""
    complete(port, [3, 4, 5 + number], max_tokens=1)
    return _hit(port, prompt, whole=whole)


def _each(prompts: Prompts) -> list[tuple[int, int, list[int]]]:
    """(length, number, prompt) of all, lengths taking turns."""
    most = max(len(each) for each in prompts.values())
    turns = ((number, length) for number in range(most) for length in prompts)
    return [(length, at, prompts[length][at]) for at, length in turns if at < len(prompts[length])]


# -- peers


def _example(where: Folder, model: Path, options: argparse.Namespace) -> int:
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(where.path / "kv")},
    }
    return where.start_vllm(model, options.cores, transfer)


def _lmcache(where: Folder, model: Path, options: argparse.Namespace) -> int:
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
    return where.start_vllm(model, options.cores, transfer)


def _mooncake(where: Folder, model: Path, options: argparse.Namespace) -> int:
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
    return where.start_vllm(model, options.cores, transfer, environ={"MOONCAKE_CONFIG_PATH": str(config)})


def _hit(port: int, prompt: list[int], *, whole: bool = True) -> float:
    """Ask what must be cached. Raises RuntimeError if it was not."""
    answer = complete(port, prompt, max_tokens=1)
    wanted = _cached_tokens(len(prompt)) if whole else len(prompt) // 2
    if answer.cached_tokens < wanted:
        raise RuntimeError(f"{answer.cached_tokens} of {len(prompt)} tokens were cached, wanted {wanted}")
    return answer.ttft_s


def _cached_tokens(length: int) -> int:
    """Of a prompt, those that a cache can have: whole blocks without the last token."""
    return (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def _warm(port: int, seed: int = 99) -> None:
    for prompt in _prompts(seed, 1500, WARM_UP):
        complete(port, prompt, max_tokens=2)
        complete(port, prompt, max_tokens=2)


def _prompts(seed: int, length: int, count: int) -> list[list[int]]:
    draw = random.Random(seed * 10_000 + length)
    return [[draw.randrange(3, VOCABULARY) for _ in range(length)] for _ in range(count)]


# -- the report


def _memcpy_s(size: int) -> float:
    """The median of some copies of so many bytes, as one thread makes them. None of these is in a cache of
    the processor, for nothing is of what is loaded, either.
    """
    source, target, other = (np.ones(each, np.uint8) for each in (size, size, BEYOND_CACHES))
    seconds = []
    for _ in range(7):
        np.add(other, 1, out=other)
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _report(console: Console, label: str, figures: Figures, token_bytes: int) -> bool:
    title = f"{label}, {fast_dtype()}, {token_bytes >> 10} KiB a token: medians"
    table = Table("TTFT in ms", *map(str, LENGTHS), title=title)
    for name in dict.fromkeys(name for name, _ in figures.ttft_s):
        cells = [figures.median_ms(name, length) for length in LENGTHS]
        table.add_row(name, *("-" if cell is None else f"{cell:.1f}" for cell in cells))
    table.add_section()
    over: dict[str, list[float]] = {}
    for name in dict.fromkeys(name for name, _ in figures.over_s):
        over[name] = [statistics.median(figures.over_s[name, length]) * 1e3 for length in LENGTHS]
        table.add_row(f"{name}, over the floor", *(f"{each:.1f}" for each in over[name]))
    bounds = [1.5e3 * statistics.median(figures.memcpy_s[length]) + 3 for length in LENGTHS]
    table.add_row("wanted: 1.5 × memcpy + 3 ms", *(f"≤ {bound:.1f}" for bound in bounds))
    storing = [statistics.median(figures.ratios[length]) for length in LENGTHS]
    table.add_row("cold, storing / cold (wanted ≤ 1.03)", *(f"{ratio:.3f}" for ratio in storing))
    console.print(table)
    for name, why in figures.left_out.items():
        console.print(f"left out: {name}: {why}", markup=False)
    met = all(a <= b for a, b in zip(over[OURS], bounds, strict=True))
    peers = [values for name, values in over.items() if name != OURS]
    faster = all(a < b for values in peers for a, b in zip(over[OURS], values, strict=True))
    beside = f"faster than each of {len(peers)} peers: {faster}" if peers else "no peer was measured"
    console.print(f"over the floor: {'met' if met else 'missed'}; {beside}")
    return met and faster and max(storing) <= 1.03


# -- throughput


def _chat(path: Path, model: Path) -> str:
    """Turns per second of chats over two engines, a core each, every turn at the other engine; without
    VCache and with it.
    """
    seconds = {}
    for name in ("without", "with"):
        with folder(Path(f"{path}-{name}")) as where:
            if name == "with":
                where.start_pool()
            transfers = [where.vcache("1GiB") if name == "with" else None for _ in range(2)]
            ports = [where.start_vllm(model, core, each) for core, each in zip("01", transfers, strict=True)]
            for port in ports:
                _warm(port)
            seconds[name] = _chats(ports)
            hits = sum(metric(port, "vllm:vcache_hit_tokens_total") for port in ports if name == "with")
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
