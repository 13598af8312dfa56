"""What the demo and its workers say to each other: JSON lines over the worker's standard input and output."""

from __future__ import annotations

import msgspec


class WorkerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the pool is, which segment this worker's chunks go to first, and what lies under the pool."""

    runtime_dir: str
    device: str
    tier: dict[str, str | int]  # fields of the configuration, empty without a lower tier


class Serve(msgspec.Struct, tag="serve", frozen=True):
    """Answer `prompt` with `answer_tokens` tokens; `cached`: with what the pool has, then store the rest."""

    prompt: list[int]
    answer_tokens: int
    cached: bool


class Look(msgspec.Struct, tag="look", frozen=True):
    """Look `prompt` up in the pool, nothing more."""

    prompt: list[int]


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The worker has its model and its engine."""

    parameters: int
    kv_bytes_per_token: int
    chunk_tokens: int


class Served(msgspec.Struct, tag="served", frozen=True):
    """The answer to `Serve`."""

    answer: list[int]
    hit_tokens: int
    moved_bytes: int
    retrieve_seconds: float
    first_token_seconds: float  # lookup and retrieve included
    kv_difference: float | None  # largest, to the worker's previous run; None when that had another prompt


class Looked(msgspec.Struct, tag="looked", frozen=True):
    """The answer to `Look`."""

    hit_tokens: int
    seconds: float


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The worker met an exception and has ended."""

    error: str


Command = Serve | Look
Reply = Ready | Served | Looked | Failed
