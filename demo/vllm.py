"""`python -m demo.vllm`: two vLLM servers, one core each, and one long document asked of the first and then
of the second, which has its KV from the pool.

Exit code 0 when the answers agree and the second one had it cached, 1 when something was wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from demo.__main__ import private_directory
from demo.processes import Child, DemoFailed
from demo.prompts import DOCUMENT
from demo.random_model import make_model
from demo.report import make_console
from demo.vllm_client import Completion, complete, healthy, metric

START_SECONDS_MAX: Final = 600.0
"""For a vLLM server to be ready: it imports for half a minute, and two share the machine."""

SEGMENT: Final = "512MiB"
QUESTIONS: Final = ("What is told to the keeper who comes?", "When is the fog signal started?")
ANSWER_TOKENS: Final = 16


def main() -> int:
    """Show it once; return the exit code."""
    console = make_console()
    try:
        with ExitStack() as stack:
            directory = private_directory()
            stack.callback(shutil.rmtree, directory)
            _show(console, directory, stack)
    except (DemoFailed, OSError, RuntimeError) as failure:
        console.print("\n[bold red]The demo failed.[/bold red]")
        console.print(str(failure), markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted; all processes were ended.")
        return 130
    return 0


def _show(console: Console, directory: Path, stack: ExitStack) -> None:
    runtime = directory / "run"
    model = make_model(directory / "model")
    console.print("Starting a metadata server, a holder of shared memory, and two vLLM servers: minutes.")
    server = Child("metadata server", ["metadata_server.server", "--runtime-dir", str(runtime)], directory)
    stack.callback(server.end)
    server.wait_for_log("ready")
    holding = ["vcache.cli", "segment", "--device", "shm:0", "--size", SEGMENT, "--runtime-dir", str(runtime)]
    holder = Child("holder", holding, directory)
    stack.callback(holder.end)
    server.wait_for_log("segment lent")
    ports = [_free_port(), _free_port()]
    engines = [_vllm(number, port, model, runtime, directory) for number, port in enumerate(ports)]
    for engine in engines:
        stack.callback(engine.end)
    for engine, port in zip(engines, ports, strict=True):
        engine.wait_until(partial(healthy, port), START_SECONDS_MAX, "answer")
        console.print(f"A vLLM server answers at port {port}.")
    for port in ports:
        complete(port, "a few words to warm up " * 20, max_tokens=4)
    servers = list(zip(("vLLM 0", "vLLM 1"), ports, strict=True))
    answers = [
        _ask(f"question {at + 1}", question, name, port)
        for at, question in enumerate(QUESTIONS)
        for name, port in (servers if not at else servers[::-1])
    ]
    console.print(_table(answers))
    _check(answers)
    console.print(
        "The second server had the document's KV from the pool and computed only what is no whole block. "
        "The answers agree."
    )


@dataclass(frozen=True)
class _Answer:
    """from_pool: prompt tokens whose KV came from the pool; vLLM's own prefix cache had the other cached
    ones.
    """

    question: str
    server: str
    given: Completion
    from_pool: int


def _ask(label: str, question: str, name: str, port: int) -> _Answer:
    before = metric(port, "vllm:vcache_hit_tokens_total")
    given = complete(port, f"{DOCUMENT}\n\n{question}\n", max_tokens=ANSWER_TOKENS)
    return _Answer(label, name, given, int(metric(port, "vllm:vcache_hit_tokens_total") - before))


def _vllm(number: int, port: int, model: Path, runtime: Path, directory: Path) -> Child:
    transfer = {
        "kv_connector": "VCacheConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"runtime_dir": str(runtime), "segment.size": 0},
    }
    arguments = [
        "vllm.entrypoints.openai.api_server",
        *("--model", str(model), "--served-model-name", "demo", "--port", str(port), "--host", "127.0.0.1"),
        *("--max-model-len", "8192", "--block-size", "32", "--enforce-eager"),
        *("--dtype", "float32"),  # bfloat16 rounds so that a cached answer may differ from a computed one
        *("--prefix-caching-hash-algo", "sha256_cbor", "--enable-prompt-tokens-details"),
        *("--kv-transfer-config", json.dumps(transfer)),
    ]
    cores = sorted(os.sched_getaffinity(0))
    environ = {
        "VLLM_CPU_OMP_THREADS_BIND": str(cores[number % len(cores)]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Child(f"vllm {number}", arguments, directory, environ=environ)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _table(answers: list[_Answer]) -> Table:
    table = Table("prompt", "served by")
    for column in ("tokens", "cached_tokens", "from the pool", "TTFT"):
        table.add_column(column, justify="right")
    table.add_column("answer")
    first: dict[str, str] = {}
    for answer in answers:
        agrees = answer.given.text == first.setdefault(answer.question, answer.given.text)
        table.add_row(
            answer.question,
            answer.server,
            str(answer.given.prompt_tokens),
            str(answer.given.cached_tokens),
            str(answer.from_pool),
            f"{answer.given.ttft_s * 1e3:.0f} ms",
            "same" if agrees else "differs",
        )
    return table


def _check(answers: list[_Answer]) -> None:
    """Raise DemoFailed unless the document was cached for all but the first, and the answers agree."""
    cold, *cached = answers
    for answer in cached:
        given = answer.given
        if given.cached_tokens < given.prompt_tokens * 9 // 10:
            cached_tokens = f"{given.cached_tokens} of {given.prompt_tokens}"
            raise DemoFailed(f"{answer.server}, {answer.question}: {cached_tokens} tokens were cached")
    if cached[0].from_pool != cached[0].given.cached_tokens:
        raise DemoFailed(f"{cached[0].server}: {cached[0].from_pool} tokens came from the pool")
    for one, other in zip(answers[::2], answers[1::2], strict=True):
        if one.given.text != other.given.text:
            raise DemoFailed(f"{one.question}: {one.given.text!r} and {other.given.text!r} differ")
    if cached[0].given.ttft_s >= cold.given.ttft_s:
        raise DemoFailed("the first token came no sooner from the pool")


if __name__ == "__main__":
    sys.exit(main())
