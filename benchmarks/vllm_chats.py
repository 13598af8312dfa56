"""Chats over two vLLM servers, every turn at the other: turns per second without VCache and with it."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

from benchmarks.vllm_servers import folder
from benchmarks.vllm_workload import warm
from demo.random_model import VOCABULARY
from demo.vllm_client import complete, metric

CHATS, TURNS, TURN_TOKENS, ANSWER_TOKENS = 6, 4, 400, 16


def chats(path: Path, model: Path) -> str:
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
                warm(port)
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
