"""One worker of the demo: a model, a paged KV cache and a VCache engine.

`python -m demo.worker SETTINGS`, with SETTINGS as JSON (`WorkerSettings`). Commands come as lines on standard
input, replies go to standard output, and whatever else is printed to standard error.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import Any, BinaryIO

import msgspec
import torch

from demo.messages import Command, Failed, Look, Looked, Ready, Reply, Serve, Served, WorkerSettings
from demo.paged_llama import (
    HEAD_SIZE,
    KV_HEADS,
    LAYERS,
    STEP_TOKENS,
    PagedKV,
    PagedSequence,
    generate,
    make_model,
)
from vcache import KVLayout, VCacheEngine

PAGES = 512
"""Pages of the worker's KV cache: twice the longest prompt's, so that page tables are scattered."""


class Worker:
    """Serves prompts, with the pool or without it."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.model = make_model()
        self.kv = PagedKV(PAGES)
        tier: dict[str, Any] = dict(settings.tier)
        self.engine = VCacheEngine(
            layout=KVLayout(
                num_layers=LAYERS,
                num_kv_heads=KV_HEADS,
                head_size=HEAD_SIZE,
                dtype="float32",
                kv_parts=2,
                chunk_tokens=STEP_TOKENS,
                form="tokens",
            ),
            model="demo-llama-seed0",
            kv_axes="kpshd",
            runtime_dir=settings.runtime_dir,
            device=settings.device,
            segment={"size": 0},
            server={"autostart": False},
            **tier,
        )
        self.previous: tuple[list[int], torch.Tensor] | None = None  # prompt and KV of the last run

    def handle(self, command: Command) -> Reply:
        """Do what `command` says."""
        if isinstance(command, Look):
            started = time.perf_counter()
            hit = self.engine.lookup(command.prompt[:-1])
            return Looked(hit_tokens=hit, seconds=time.perf_counter() - started)
        return self._serve(command)

    def _serve(self, command: Serve) -> Served:
        prompt = command.prompt
        sequence = self.kv.fresh_sequence(len(prompt) + command.answer_tokens)
        retrieved_before = self._retrieved_bytes()
        started = time.perf_counter()
        hit, retrieve_seconds = self._retrieve(prompt, sequence) if command.cached else (0, 0.0)
        answer = generate(self.model, sequence, prompt, hit, command.answer_tokens)
        tokens = [next(answer)]
        first_token_seconds = time.perf_counter() - started
        tokens.extend(answer)
        if command.cached:
            slots = sequence.slot_mapping(0, len(prompt))
            self.engine.store(prompt, kvcaches=self.kv.layers, slot_mapping=slots, offset=hit)
        return Served(
            answer=tokens,
            hit_tokens=hit,
            moved_bytes=self._retrieved_bytes() - retrieved_before,
            retrieve_seconds=retrieve_seconds,
            first_token_seconds=first_token_seconds,
            kv_difference=self._kv_difference(prompt, sequence.contents(len(prompt))),
        )

    def _retrieved_bytes(self) -> int:
        return int(self.engine.get_stats()["retrieved_bytes"])

    def _kv_difference(self, prompt: list[int], contents: torch.Tensor) -> float | None:
        """Return how far the KV of `prompt` is from the previous run's at most, and keep it for the next."""
        previous, self.previous = self.previous, (prompt, contents)
        if previous is None or previous[0] != prompt:
            return None
        return float((contents - previous[1]).abs().max())

    def _retrieve(self, prompt: list[int], sequence: PagedSequence) -> tuple[int, float]:
        """Load the longest prefix there is, but not the last token; return its tokens and the seconds."""
        found = self.engine.lookup(prompt[:-1])
        if not found:
            return 0, 0.0
        slots = sequence.slot_mapping(0, found)
        started = time.perf_counter()
        mask = self.engine.retrieve(prompt[:found], kvcaches=self.kv.layers, slot_mapping=slots)
        seconds = time.perf_counter() - started
        return int(mask.int().cumprod(0).sum()), seconds


def take_standard_output() -> BinaryIO:
    """Return standard output for messages, and send whatever else is printed to standard error."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def main() -> None:
    """Serve until standard input ends; a failure is told to the demo and ends the worker with exit code 1."""
    replies = take_standard_output()

    def say(reply: Reply) -> None:
        replies.write(msgspec.json.encode(reply) + b"\n")
        replies.flush()

    try:
        torch.set_num_threads(1)  # a worker has one core, as it would have one GPU
        worker = Worker(msgspec.json.decode(sys.argv[1], type=WorkerSettings))
        with worker.engine:
            say(
                Ready(
                    parameters=sum(weights.numel() for weights in worker.model.parameters()),
                    kv_bytes_per_token=worker.kv.bytes_per_token,
                    chunk_tokens=STEP_TOKENS,
                )
            )
            for line in sys.stdin.buffer:
                say(worker.handle(msgspec.json.decode(line, type=Command)))
    except Exception as error:
        traceback.print_exc()
        say(Failed(error=f"{type(error).__name__}: {error}"))
        sys.exit(1)


if __name__ == "__main__":
    main()
