"""KV events: which blocks the pool has now, on the stream that vLLM publishes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_events import MEDIUM_CPU, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from integration.vllm.groups import Groups


@dataclass(frozen=True)
class _Note:
    """What an event says, taken down while the request is there."""

    hashes: list[bytes]
    parent: bytes | None
    tokens: list[int]
    lora_id: int | None
    lora_name: str | None


class StoredEvents:
    """Events of chunks that were stored. enabled: whether anybody wants them."""

    def __init__(self, groups: Groups, *, enabled: bool) -> None:
        self._groups = groups
        self._enabled = enabled
        self._waiting: list[Any] = []

    @classmethod
    def of(cls, vllm_config: Any, groups: Groups) -> StoredEvents:
        """As vLLM is configured."""
        events = vllm_config.kv_events_config
        return cls(groups, enabled=bool(events and events.enable_kv_cache_events))

    def note(self, request: Any, chunks: Sequence[int]) -> list[_Note] | None:
        """What will be said of these chunks of a request, once they are stored."""
        if not self._enabled:
            return None
        step, tokens = self._groups.hashes_per_chunk, self._groups.chunk_tokens
        lora = request.lora_request
        return [
            _Note(
                [bytes(each) for each in request.block_hashes[chunk * step : (chunk + 1) * step]],
                bytes(request.block_hashes[chunk * step - 1]) if chunk else None,
                list(request.all_token_ids[chunk * tokens : (chunk + 1) * tokens]),
                lora.lora_int_id if lora else None,
                lora.lora_name if lora else None,
            )
            for chunk in chunks
        ]

    def stored(self, notes: list[_Note] | None) -> None:
        """They are stored, on all ranks."""
        self._waiting += [
            BlockStored(
                block_hashes=[maybe_convert_block_hash(each) for each in note.hashes],
                parent_block_hash=None if note.parent is None else maybe_convert_block_hash(note.parent),
                token_ids=note.tokens,
                block_size=self._groups.hash_tokens,
                lora_id=note.lora_id,
                medium=MEDIUM_CPU,
                lora_name=note.lora_name,
            )
            for note in notes or ()
        ]

    def take(self) -> list[Any]:
        """What happened since the last call."""
        taken, self._waiting = self._waiting, []
        return taken
