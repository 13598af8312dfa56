"""Processes for the tests: engines, a metadata server, holders; each ends with its test."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.vllm.models import VOCABULARY
from vcache.client import Client
from vcache.config import load

ROOT = Path(__file__).parents[2]
START_S = 300.0
ANSWER_S = 120.0
BLOCK = 32
"""Tokens of a block, and of a chunk: the least that CPUs take."""


def prompt(seed: int, tokens: int) -> list[int]:
    """Random tokens, the same for a seed; a longer one begins with the shorter one."""
    draw = random.Random(seed)
    return [draw.randrange(3, VOCABULARY) for _ in range(tokens)]


class EngineFailed(Exception):
    """The engine's process said that a command failed, or ended."""


class EngineProcess:
    """One vLLM engine in a process group of its own, with its log in a file."""

    def __init__(self, log: Path, environ: dict[str, str]) -> None:
        self.log = log
        here, there = os.pipe(), os.pipe()
        command = [sys.executable, "-m", "tests.vllm.engine", str(here[0]), str(there[1])]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=(here[0], there[1]),
                start_new_session=True,
            )
        os.close(here[0])
        os.close(there[1])
        self._commands, self._answers = os.fdopen(here[1], "w"), os.fdopen(there[0])

    def send(self, command: str, **arguments: Any) -> None:
        """Give a command and do not wait."""
        self._commands.write(json.dumps([command, arguments]) + "\n")
        self._commands.flush()

    def receive(self, within_s: float = ANSWER_S) -> Any:
        """The answer to the oldest command. Raises EngineFailed."""
        if not select.select([self._answers], [], [], within_s)[0]:
            raise EngineFailed(f"no answer within {within_s} s\n{self.tail()}")
        line = self._answers.readline()
        if not line:
            raise EngineFailed(f"the engine's process ended\n{self.tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineFailed(f"{answer['error']}\n{self.tail()}")
        return answer["result"]

    def call(self, command: str, within_s: float = ANSWER_S, **arguments: Any) -> Any:
        """Give a command and wait for the answer."""
        self.send(command, **arguments)
        return self.receive(within_s)

    def generate(self, *prompts: list[int], **arguments: Any) -> list[dict[str, Any]]:
        """Answer prompts, all at once."""
        answers: list[dict[str, Any]] = self.call("generate", prompts=list(prompts), **arguments)
        return answers

    def ask(self, asked: list[int], **arguments: Any) -> dict[str, Any]:
        """Answer one prompt."""
        return self.generate(asked, **arguments)[0]

    def tail(self, lines: int = 60) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def kill(self) -> None:
        """SIGKILL it and all that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        self._commands.close()
        self._answers.close()


def forget(engine: EngineProcess) -> None:
    """Empty the engine's own prefix cache, which waits for what is on its way to the pool."""
    eventually(lambda: engine.call("reset"), "no block is in use")


class Machine:
    """A runtime directory, and what runs in it: `with Machine(folder) as machine:`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runtime = tempfile.TemporaryDirectory(prefix="vcv", dir="/dev/shm")
        self.runtime = Path(self._runtime.name) / "run"
        self.server: subprocess.Popen[bytes] | None = None
        self.holders: list[subprocess.Popen[bytes]] = []
        self.engines: list[EngineProcess] = []
        self._observer: Client | None = None

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for engine in self.engines:
            engine.kill()
        if self._observer is not None:
            self._observer.close()
        for process in (*self.holders, self.server):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait(30)
        self._runtime.cleanup()

    def environ(self) -> dict[str, str]:
        """Of every process here: no server is started but by the test."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "VCACHE_RUNTIME_DIR": str(self.runtime),
            "VCACHE_SERVER_AUTOSTART": "false",
            "VCACHE_CLIENT_DECLARE_INTERVAL_S": "0.2",
            # vLLM computes on all cores: a request that waits for one is no failure that a test is about.
            "VCACHE_CLIENT_REQUEST_TIMEOUT_MS": "10000",
        }

    def start_server(self) -> None:
        """Start a metadata server and wait until it answers."""
        self.server = subprocess.Popen(
            [sys.executable, "-m", "metadata_server.server"], cwd=ROOT, env=self.environ()
        )
        eventually(lambda: self.observer.connected, "the server answers")

    def kill_server(self) -> None:
        """SIGKILL the server."""
        assert self.server is not None
        self.server.kill()
        self.server.wait(30)

    def start_holder(self, size: str = "64MiB") -> subprocess.Popen[bytes]:
        """Start a holder and wait until its segment is lent."""
        before = len(self.observer.stats().segments)
        holder = subprocess.Popen(
            [sys.executable, "-m", "vcache.cli", "segment", "--device", "shm:0", "--size", size],
            cwd=ROOT,
            env=self.environ(),
            stdout=subprocess.DEVNULL,
        )
        self.holders.append(holder)
        eventually(lambda: len(self.observer.stats().segments) > before, "the segment is lent")
        return holder

    @property
    def observer(self) -> Client:
        """A client of the test itself."""
        if self._observer is None:
            config = load(runtime_dir=str(self.runtime), server={"autostart": False}).config
            self._observer = Client(config, name="observer")
        return self._observer

    def counters(self) -> dict[str, float]:
        """What the server counts."""
        return self.observer.stats().counters

    def chunks(self) -> int:
        """How many chunks the pool has."""
        return len(self.observer.list(0, 1000).rows)

    def nothing_is_held(self) -> None:
        """Wait until nobody holds a right; then the server proves that nothing leaks."""
        rights = ("reservations", "leases", "pins")
        eventually(lambda: not any(self.counters().get(name, 0) for name in rights), "all rights have ended")
        self.observer.check()

    def engine(
        self,
        model: Path,
        *,
        name: str = "engine",
        cores: str = "0-1",
        connector: bool = True,
        extra: dict[str, Any] | None = None,
        transfer: dict[str, Any] | None = None,
        environ: dict[str, str] | None = None,
        wait: bool = True,
        **options: Any,
    ) -> EngineProcess:
        """Start an engine. extra: kv_connector_extra_config. transfer: other fields of kv_transfer_config."""
        environment = {
            **self.environ(),
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **(environ or {}),
        }
        engine = EngineProcess(self.folder / f"{name}-{len(self.engines)}.log", environment)
        self.engines.append(engine)
        config = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "block_size": BLOCK,
            "max_model_len": 2048,
            "max_num_seqs": 16,
            "num_gpu_blocks_override": 256,
            "prefix_caching_hash_algo": "sha256_cbor",
            "disable_log_stats": False,
            "seed": 0,
            **options,
        }
        if connector:
            config["kv_transfer_config"] = {
                "kv_connector": "VCacheConnector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"segment.size": 0, **(extra or {})},
                **(transfer or {}),
            }
        engine.send("start", **config)
        if wait:
            engine.receive(START_S)
        return engine


def eventually(holds: Any, what: str, within_s: float = 60.0) -> None:
    """Wait until `holds()`. AssertionError with `what` after `within_s`."""
    deadline_s = time.monotonic() + within_s
    pause = random.Random(0)
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {within_s} s: {what}"
        select.select([], [], [], pause.uniform(0.01, 0.03))
