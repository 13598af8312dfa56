"""A minute of everything at once: every byte served is checked, and nothing is left over at the end."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

from tests.lmcache import engine
from tests.processes.content import prompt
from tests.processes.pool import Pool

CHUNK = engine.CHUNK_TOKENS
THREADS = 8
DURATION_S = 60.0
PROMPTS = 40


def traffic(child: Any, seed: int, duration_s: float) -> dict[str, int]:
    """Eight threads store, look up, retrieve and remove prompts that share prefixes; what happened."""
    counts = {"stored": 0, "hits": 0, "wrong": 0, "removed": 0, "pinned": 0}
    errors: list[BaseException] = []
    guard = threading.Lock()
    until_s = time.monotonic() + duration_s
    cache, backend = child.engine, child.kept["backend"]

    def tokens_of(rng: random.Random) -> list[int]:
        head = prompt(rng.randrange(PROMPTS), rng.randrange(1, 8) * CHUNK)
        return head + prompt(1000 + rng.randrange(PROMPTS), rng.randrange(4) * CHUNK)

    def run(number: int) -> None:
        rng = random.Random(seed * 100 + number)
        turn = 0
        try:
            while time.monotonic() < until_s:
                turn += 1
                tokens, action = tokens_of(rng), rng.random()
                name = f"{number}-{turn}"
                if action < 0.35:
                    engine.store_tokens(child, tokens)
                    add("stored", 1)
                elif action < 0.85:
                    pin = rng.random() < 0.5
                    if pin:
                        add("pinned", cache.lookup(tokens, lookup_id=name, pin=True) // CHUNK)
                    hit, wrong = engine.retrieve_tokens(child, tokens, name)
                    if pin:
                        cache.lookup_unpin(name)
                    add("hits", hit // CHUNK)
                    add("wrong", wrong)
                elif action < 0.995:
                    add("removed", cache.clear(tokens[: rng.randrange(1, 4) * CHUNK]))
                else:
                    backend.clear()
        except BaseException as error:
            errors.append(error)
            raise

    def add(name: str, count: int) -> None:
        with guard:
            counts[name] += count

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return counts


def test_a_minute_of_traffic(pool: Pool) -> None:
    pool.start_holder(size="512KiB")  # a third of what there is to store
    workers = [engine.start(pool), engine.start(pool)]
    for worker in workers:
        worker.send("run", traffic, worker.pid, DURATION_S)
    for worker in workers:
        counts = worker.result(DURATION_S + 60)
        assert counts["wrong"] == 0
        assert min(counts["stored"], counts["hits"], counts["removed"], counts["pinned"]) > 0, counts
        stats = worker.call("run", engine.stats)
        assert stats["failures"] == stats["held_chunks"] == stats["drafts"] == stats["pins"] == 0
        worker.call("run", engine.close)
    pool.assert_nothing_leaks()
    assert pool.counters()["evicted"] > 0
