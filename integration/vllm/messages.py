"""What the two halves say to each other: orders from the scheduler's, reports from the workers'."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

Place = tuple[int, int]
"""Whose KV a chunk is: (pipeline rank, KV rank). Ranks with equal KV (MLA) have one KV rank."""


@dataclass(frozen=True)
class Identity(KVConnectorHandshakeMetadata):
    """What a worker's chunks are: for the keys that the scheduler's half makes of block hashes.

    fingerprints, identities: of each group, its layout and everything that block hashes leave out. model: the
    name under which the pool groups this model's chunks.
    """

    place: Place
    model: str
    fingerprints: tuple[bytes, ...]
    identities: tuple[str, ...]
    chunk_bytes: tuple[int, ...]


@dataclass(frozen=True)
class LoadPart:
    """Chunks of one group to load: `extents` (packed EXTENT, with the generations that were granted) into
    `pages`.

    chunks: their numbers in the sequence. pages: vLLM's block ids, as many per chunk as it has pages, -1 for
    those that are not to be written. incomplete: vLLM counts on blocks for which there is no chunk, so the
    load has failed.
    """

    group: int
    chunks: tuple[int, ...]
    pages: tuple[int, ...]
    extents: bytes
    incomplete: bool = False


@dataclass(frozen=True)
class Load:
    """Load these chunks for a request, under a pin that the scheduler's half holds until all ranks have
    reported.
    """

    id: int
    request: str
    is_async: bool
    lineage: int
    parts: dict[Place, tuple[LoadPart, ...]]


@dataclass(frozen=True)
class SavePart:
    """Chunks of one group to store: of each rank its keys, and the pages they lie in."""

    group: int
    keys: dict[Place, tuple[bytes, ...]]
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Save:
    """Store these chunks; vLLM leaves their pages alone until all ranks have reported."""

    id: int
    parts: tuple[SavePart, ...]


@dataclass(frozen=True)
class FetchPart:
    """Chunks of one group that lower tiers may have: of each rank its keys, in the order of the sequence."""

    group: int
    keys: dict[Place, tuple[bytes, ...]]


@dataclass(frozen=True)
class Fetch:
    """Bring up into the pool what a hit needs of these chunks; the same ones of every group."""

    id: int
    parts: tuple[FetchPart, ...]


@dataclass
class Orders(KVConnectorMetadata):
    """What the workers are to do with one step. idle: the step computes nothing, so there is time to wait.
    tell: say who you are. forget: all that lower tiers have, and what is on its way there.
    """

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    fetches: list[Fetch] = field(default_factory=list)
    idle: bool = False
    tell: bool = False
    forget: bool = False


@dataclass
class Report(KVConnectorWorkerMetadata):
    """What workers have done. loads, saves, fetches: by id, how many ranks are through with it.

    failed: by a load's id, the first chunk that did not arrive. stored: by a save's id, how many ranks have
    all of it in the pool now. fetched: by a fetch's id, how many chunks it brought. forgotten: how many ranks
    have forgotten what lower tiers had.
    """

    loads: Counter[int] = field(default_factory=Counter)
    saves: Counter[int] = field(default_factory=Counter)
    failed: dict[int, int] = field(default_factory=dict)
    stored: Counter[int] = field(default_factory=Counter)
    fetches: Counter[int] = field(default_factory=Counter)
    fetched: Counter[int] = field(default_factory=Counter)
    forgotten: int = 0
    identities: dict[Place, Identity] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Report:
        """Both in one."""
        assert isinstance(other, Report)
        failed = dict(self.failed)
        for load, chunk in other.failed.items():
            failed[load] = min(chunk, failed.get(load, chunk))
        return Report(
            self.loads + other.loads,
            self.saves + other.saves,
            failed,
            self.stored + other.stored,
            self.fetches + other.fetches,
            self.fetched + other.fetched,
            self.forgotten + other.forgotten,
            self.identities | other.identities,
        )

    def __bool__(self) -> bool:
        return bool(self.loads or self.saves or self.fetches or self.forgotten or self.identities)
