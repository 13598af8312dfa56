"""A vLLM server as its user sees it: a streamed completion, when its first token came, what was cached."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Completion:
    """ttft_s: until the first piece of the answer. cached_tokens: of the prompt, as the server says."""

    text: str
    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int


def complete(
    port: int, prompt: str | list[int], *, max_tokens: int = 16, timeout_s: float = 300.0
) -> Completion:
    """Ask for a completion. Raises OSError, HTTPException, RuntimeError with the server's words."""
    asked = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        started_s = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"the server answered {response.status}: {response.read()[:500]!r}")
        return _read(response, started_s)
    finally:
        connection.close()


def healthy(port: int) -> bool:
    """Whether a server answers there."""
    try:
        return get(port, "/health")[0] == 200
    except OSError:
        return False


def get(port: int, path: str) -> tuple[int, str]:
    """(status, body) of a GET. Raises OSError."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def metric(port: int, name: str) -> float:
    """The sum of one of a server's metrics over labels. Raises OSError."""
    lines = get(port, "/metrics")[1].splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


def _read(response: http.client.HTTPResponse, started_s: float) -> Completion:
    text, ttft_s = "", 0.0
    usage: dict[str, Any] = {}
    for line in response:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[len(b"data: ") :])
        if "error" in event:
            raise RuntimeError(f"the server answered {event['error']}")
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            ttft_s = ttft_s or time.perf_counter() - started_s
            text += choice["text"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Completion(text, ttft_s, time.perf_counter() - started_s, usage.get("prompt_tokens", 0), cached)
