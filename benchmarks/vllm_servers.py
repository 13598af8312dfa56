"""vLLM servers for benchmarks: each kind of cache, started the same way, on the same cores."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from demo.processes import Child
from demo.random_model import fast_dtype
from demo.vllm_client import healthy

START_SECONDS_MAX = 600.0
BLOCK_TOKENS = 32
SEGMENT = "2GiB"
PROMPT_TOKENS_MAX = 8000

STEP_TOKENS = 4096
"""More than the longest prompt has: ExampleConnector ends an engine that takes two steps."""

VCACHE: dict[str, Any] = {
    "kv_connector": "VCacheConnector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}


class Folder:
    """Where a run keeps its logs, sockets and files; what was started in it ends with the stack."""

    def __init__(self, path: Path, stack: ExitStack, engines: dict[int, list[Child]] | None = None) -> None:
        self.path = path
        self.runtime = path / "run"
        self._stack = stack
        self._started = 0
        self._engines = {} if engines is None else engines

    def start(self, name: str, arguments: list[str], environ: Mapping[str, str] | None = None) -> Child:
        """Start `python -m …`."""
        self._started += 1
        child = Child(f"{self._started} {name}", arguments, self.path, environ=environ)
        self._stack.callback(_send, child, signal.SIGKILL)  # what it has left behind
        self._stack.callback(child.end)
        return child

    def run(self, command: list[str], environ: Mapping[str, str] | None = None) -> None:
        """Start another program, with its output in a log."""
        self._started += 1
        with (self.path / f"{self._started}-{Path(command[0]).name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environ or {})},
                start_new_session=True,
            )

        def end() -> None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()

        self._stack.callback(end)

    def start_pool(self) -> Child:
        """A metadata server; engines lend the segments."""
        server = self.start("metadata", ["metadata_server.server", "--runtime-dir", str(self.runtime)])
        server.wait_for_log("ready")
        return server

    def start_vllm(
        self,
        model: Path,
        cores: str,
        transfer: dict[str, Any] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        step_tokens: int = STEP_TOKENS,
    ) -> int:
        """Start a vLLM server and wait until it answers; its port. step_tokens: of a step at most."""
        port = free_port()
        arguments = [
            "vllm.entrypoints.openai.api_server",
            *("--model", str(model), "--served-model-name", "m", "--port", str(port), "--host", "127.0.0.1"),
            *("--max-model-len", "8192", "--block-size", str(BLOCK_TOKENS), "--enforce-eager"),
            *("--prefix-caching-hash-algo", "sha256_cbor", "--enable-prompt-tokens-details"),
            *("--max-num-seqs", "8", "--dtype", fast_dtype()),
            *("--max-num-batched-tokens", str(step_tokens)),
        ]
        if transfer is not None:
            arguments += ["--kv-transfer-config", json.dumps(transfer)]
        bound = {
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_CPU_KVCACHE_SPACE": "3",
            "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **(environ or {}),
        }
        child = self.start("vllm", arguments, bound)
        self._stack.callback(_send, child, signal.SIGCONT)  # what is stopped does not end
        child.wait_until(partial(healthy, port), START_SECONDS_MAX, "answer")
        self._engines[port] = [child]
        return port

    def stop_vllm(self, port: int) -> None:
        """End the server at this port."""
        child = self._engines.pop(port)[0]
        _send(child, signal.SIGCONT)
        child.end()
        _send(child, signal.SIGKILL)  # what it has left behind

    def only(self, port: int) -> None:
        """Of all servers let this one run, and stop the others until it is their turn: an idle one takes
        cores, too.
        """
        self.stop_all(but=port)
        for child in self._engines[port]:
            _send(child, signal.SIGCONT)

    def stop_all(self, *, but: int = 0) -> None:
        """Stop all servers, but perhaps the one at this port, until it is their turn."""
        for port, children in self._engines.items():
            for child in children if port != but else ():
                _send(child, signal.SIGSTOP)

    @contextmanager
    def tied(self, port: int, child: Child) -> Iterator[None]:
        """Stop and continue another process with the server at this port."""
        self._engines[port].append(child)
        try:
            yield
        finally:
            self._engines[port].remove(child)
            _send(child, signal.SIGCONT)

    @contextmanager
    def within(self, name: str) -> Iterator[Folder]:
        """A folder in this one, whose processes end with the block."""
        with ExitStack() as stack:
            inner = Folder(self.path / name, stack, self._engines)
            inner.path.mkdir(mode=0o700)
            before = set(self._engines)
            try:
                yield inner
            finally:
                for port in set(self._engines) - before:
                    inner.stop_vllm(port)

    def last_words(self) -> str:
        """Of the logs of what was started here: the first lines that name an error, and the end."""
        words = []
        for path in self.path.glob("*.log"):
            text = path.read_text(errors="replace")
            errors = [line for line in text.splitlines() if "Error: " in line][:3]
            words += [f"{path.name}:", *errors, f"…{text[-200:]}"]
        return "\n".join(words)

    def vcache(self, lends: int | str = 0) -> dict[str, Any]:
        """The connector's configuration. lends: the size of the engine's segment."""
        extra = {"runtime_dir": str(self.runtime), "segment.size": lends}
        return {**VCACHE, "kv_connector_extra_config": extra}


def _send(child: Child, number: signal.Signals) -> None:
    """To the server and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(child.process.pid, number)


@contextmanager
def folder(path: Path) -> Iterator[Folder]:
    """A run's folder; what was started in it ends with the block."""
    path.mkdir(mode=0o700)
    with ExitStack() as stack:
        yield Folder(path, stack)


def forget(port: int) -> None:
    """Empty a server's own prefix cache."""
    import http.client

    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", "/reset_prefix_cache")
        response = connection.getresponse()
        body = response.read()
        connection.close()
        if response.status == 200 and b"false" not in body.lower():
            return
        time.sleep(0.02)
    raise RuntimeError(f"the server at {port} does not reset its prefix cache")


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def program(name: str) -> str | None:
    """A command of this environment, None if it is not there."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def has_module(name: str) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(name) is not None
