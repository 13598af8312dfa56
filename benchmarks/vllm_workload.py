"""What vLLM's benchmarks ask: models with random weights, prompts of random tokens."""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.vllm_servers import BLOCK_TOKENS
from demo.random_model import DTYPE_BYTES, VOCABULARY, fast_dtype, make_model
from demo.vllm_client import complete

LENGTHS = (512, 1024, 2048, 3000)
WARM_UP = 4

MODELS = {"GQA4": 4, "MHA16": 16}
"""Their KV heads."""

LAYERS, HEAD_SIZE = 8, 64

Prompts = dict[int, list[list[int]]]
"""By their length."""


def random_prompts(seed: int, length: int, count: int) -> list[list[int]]:
    """So many prompts of a length in tokens, none of which has a prefix of another."""
    draw = random.Random(seed * 10_000 + length)
    return [[draw.randrange(3, VOCABULARY) for _ in range(length)] for _ in range(count)]


def in_turns(prompts: Prompts) -> list[tuple[int, int, list[int]]]:
    """(length, number, prompt) of all, lengths taking turns."""
    most = max(len(each) for each in prompts.values())
    turns = ((number, length) for number in range(most) for length in prompts)
    return [(length, at, prompts[length][at]) for at, length in turns if at < len(prompts[length])]


def made_models(labels: Sequence[str]) -> Iterator[tuple[str, Path, Path]]:
    """(label, folder for runs, model) of each of MODELS asked for; gone when the next one is asked for."""
    with tempfile.TemporaryDirectory(prefix="vct", dir="/dev/shm") as name:
        for label in labels:
            model = make_model(Path(name) / label, kv_heads=MODELS[label], layers=LAYERS)
            yield label, Path(name), model
            shutil.rmtree(model)


def token_bytes(model: str) -> int:
    """KV bytes of a token."""
    return LAYERS * 2 * MODELS[model] * HEAD_SIZE * DTYPE_BYTES[fast_dtype()]


def cached_tokens(length: int) -> int:
    """Of a prompt, those that a cache can have: whole blocks without the last token."""
    return (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def warm(port: int, seed: int = 99) -> None:
    """Have a server compute, and answer from its own prefix cache, before anything is measured."""
    for prompt in random_prompts(seed, 1500, WARM_UP):
        complete(port, prompt, max_tokens=2)
        complete(port, prompt, max_tokens=2)


def stir(port: int, number: int) -> None:
    """Compute a few tokens with all of the model's weights: the server is awake then, and what was in the
    processor's caches is not there any more. number: another one each time.
    """
    complete(port, [3, 4, 5 + number % 1000], max_tokens=1)


def at_least_one(text: str) -> int:
    """A count that an option gives. Raises ArgumentTypeError."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"got {count}, wanted at least 1")
    return count
