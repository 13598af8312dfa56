"""From vLLM's block hashes to chunk keys, for every group and rank."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from integration.vllm.groups import Groups, places_of
from integration.vllm.identity import lora_files, lora_identity, lora_stamp
from integration.vllm.messages import Identity, Place
from vcache.errors import ArgumentError
from vcache.keys import KeyChain, join_fields
from vcache.limits import KEY_BYTES

_RANKS_PER_STAGE = 1 << 12


class ChunkKeys:
    """Makes keys once all ranks have said what their chunks are. Used by the scheduler's half.

    private: keys that no other engine has, and others after each `rotate`.
    """

    def __init__(self, vllm_config: Any, groups: Groups, *, private: bool) -> None:
        self._vllm_config = vllm_config
        self._groups = groups
        self._places = set(places_of(groups, vllm_config.parallel_config))
        self._private = private
        self._nonce = secrets.token_bytes(KEY_BYTES) if private else b""
        self._chains: dict[tuple[bytes, Place, int, str], KeyChain] = {}
        self._loras: dict[tuple[int, str], tuple[str, str]] = {}
        self.identities: dict[Place, Identity] = {}

    def hear(self, identities: dict[Place, Identity]) -> None:
        """Some ranks have said what their chunks are."""
        self.identities.update(identities)

    @property
    def complete(self) -> bool:
        """Whether all pipeline stages and ranks are known."""
        return self.identities.keys() == self._places

    @property
    def model(self) -> str:
        """The name under which the pool groups this model's chunks."""
        return next(iter(self.identities.values())).model

    @property
    def private(self) -> bool:
        """Whether no other engine has these keys."""
        return self._private

    def rotate(self) -> None:
        """Never find again what was stored until now."""
        self._nonce = secrets.token_bytes(KEY_BYTES)
        self._chains.clear()

    def adapter(self, request: Any) -> str:
        """The identity of a request's LoRA adapter, "" without one. Raises ArgumentError, OSError.

        vLLM reads an adapter's files again when it likes: once they change nobody knows which ones it has.
        """
        lora = request.lora_request
        if lora is None:
            return ""
        files = lora_files(lora.lora_path)
        stamp, name = lora_stamp(files), (lora.lora_int_id, lora.lora_path)
        if name not in self._loras:
            self._loras[name] = stamp, lora_identity(files)
        known, identity = self._loras[name]
        if stamp != known:
            raise ArgumentError("lora_path", lora.lora_path, "files that do not change while they are served")
        return identity

    def keys(
        self, hashes: Sequence[bytes], chunks: Sequence[int], group: int, place: Place, adapter: str
    ) -> list[bytes]:
        """The keys of these chunks. hashes: the sequence's block hashes. group: its place in `Groups`."""
        step = self._groups.hashes_per_chunk
        bind = self._chain(place, group, adapter).bind
        return [bind(bytes(hashes[(chunk + 1) * step - 1])) for chunk in chunks]

    def of_all_places(
        self, hashes: Sequence[bytes], chunks: Sequence[int], group: int, adapter: str
    ) -> dict[Place, tuple[bytes, ...]]:
        """The keys of these chunks on every rank."""
        return {place: tuple(self.keys(hashes, chunks, group, place, adapter)) for place in self.identities}

    def _chain(self, place: Place, group: int, adapter: str) -> KeyChain:
        nonce = self._nonce  # another thread may draw a new one meanwhile
        chain = self._chains.get((nonce, place, group, adapter))
        if chain is None:
            identity = self.identities[place]
            rank = place[0] * _RANKS_PER_STAGE + place[1]
            salt = join_fields([*hashing(self._vllm_config), nonce])
            chain = KeyChain(identity.fingerprints[group], identity.identities[group], rank, salt, adapter)
            self._chains[nonce, place, group, adapter] = chain
        return chain


def hashing(vllm_config: Any) -> tuple[bytes, bytes]:
    """What vLLM's block hashes themselves depend on: the algorithm, and what stands for the parent of the
    first one.
    """
    from vllm.v1.core import kv_cache_utils  # its seed is drawn when the engine is nearly up

    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    return algorithm.encode(), bytes(kv_cache_utils.NONE_HASH)
