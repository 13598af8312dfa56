"""What callers pass to the engine, checked and brought to one form before anything else happens.

Everything that is wrong raises ArgumentError here, with the field, its value and what is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vcache.config import Config, load
from vcache.engine.lanes import PAST, Event
from vcache.errors import ArgumentError
from vcache.kernels import PagedKV
from vcache.keys import as_tokens, tensor_as_array
from vcache.layout import KVLayout
from vcache.limits import KEY_BYTES
from vcache.tiers import Tier


@dataclass(frozen=True)
class Transfer:
    """Chunks to move between the paged KV and the pool, in the order of the sequence.

    keys, sizes: key and bytes of each chunk; only the last may be smaller than the layout's chunk. ids:
    int64 on the CPU, the slots (tokens form) or pages (pages form) of all chunks one after the other, -1
    for none. ids_per_chunk: of a whole chunk. after: what the pages wait for: all that the caller had queued.
    """

    paged: PagedKV
    keys: list[bytes]
    sizes: list[int]
    ids: Tensor
    ids_per_chunk: int
    after: Event = PAST

    def __len__(self) -> int:
        return len(self.keys)

    def with_all_ids(self) -> Transfer:
        """Only the chunks of which every id is given: one with a gap cannot be stored."""
        if not len(self.ids) or int(self.ids.min()) >= 0:
            return self
        step = self.ids_per_chunk
        return self.pick(
            [at for at in range(len(self)) if int(self.ids[at * step : (at + 1) * step].min()) >= 0]
        )

    def tokens_in(self, size: int) -> int:
        """Tokens of a chunk of `size` bytes."""
        return size * self.paged.layout.chunk_tokens // self.paged.layout.chunk_bytes

    def part(self, begin: int, end: int | None = None) -> Transfer:
        """The chunks `begin` … `end` - 1 of it; no copy."""
        at = slice(begin, end)
        step = self.ids_per_chunk
        ids = self.ids[begin * step : None if end is None else end * step]
        return replace(self, keys=self.keys[at], sizes=self.sizes[at], ids=ids)

    def pick(self, chunks: Sequence[int]) -> Transfer:
        """The chunks with these positions, which rise."""
        if len(chunks) == len(self):
            return self
        keys, sizes = [self.keys[at] for at in chunks], [self.sizes[at] for at in chunks]
        step = self.ids_per_chunk
        parts = [self.ids[at * step : (at + 1) * step] for at in chunks]
        return replace(self, keys=keys, sizes=sizes, ids=torch.cat(parts) if parts else self.ids[:0])


def checked_tokens(tokens: Any) -> NDArray[np.int64]:
    """`tokens` as an int64 array with at least one token."""
    array = as_tokens(tokens)
    if not len(array):
        raise ArgumentError("tokens", "none", "at least one token")
    return array


def masked_tokens(mask: Any, offset: Any, count: int, chunk_tokens: int) -> int:
    """How many leading tokens of `count` are there already, by mask, by `offset`, or by neither (0).

    mask: one bool per token, False for the tokens that are there; they are a prefix of whole chunks.
    """
    masked = None if mask is None else _false_prefix(mask, count)
    if offset is not None:
        if isinstance(offset, bool) or not isinstance(offset, (int, np.integer)):
            raise ArgumentError("offset", f"{offset!r} ({type(offset).__name__})", "a number of tokens (int)")
        if not 0 <= offset <= count:
            raise ArgumentError("offset", offset, f"0 … {count}, for there are {count} tokens")
        if masked is not None and masked != offset:
            raise ArgumentError(
                "offset", offset, f"{masked}, as many as the mask has False, or only one of the two"
            )
        masked = int(offset)
    if masked is None:
        return 0
    if masked % chunk_tokens:
        field = "offset" if mask is None else "mask"
        got = masked if mask is None else f"{masked} leading False"
        raise ArgumentError(field, got, f"a multiple of chunk_tokens ({chunk_tokens})")
    return masked


def _false_prefix(mask: Any, count: int) -> int:
    if isinstance(mask, Tensor):
        mask = tensor_as_array(mask, "mask", "1-D bool, one per token")
    try:
        array = np.asarray(mask)
    except ValueError as error:  # rows of different lengths
        raise ArgumentError("mask", type(mask).__name__, f"1-D bool, one per token: {error}") from error
    if array.ndim != 1 or array.dtype != np.bool_:
        raise ArgumentError("mask", f"{array.dtype} of shape {array.shape}", "1-D bool, one per token")
    if len(array) != count:
        raise ArgumentError("mask", f"{len(array)} entries", f"{count}, one per token")
    masked = count - int(np.count_nonzero(array))
    if array[:masked].any():
        hole = masked + int(np.argmin(array[masked:]))
        raise ArgumentError(
            "mask", f"False at token {hole} after True", "False for a prefix only, True after it"
        )
    return masked


def checked_ids(field: str, ids: Any, count: int, limit: int, per: str) -> Tensor:
    """`ids` (slots or pages) as an int64 tensor on the CPU: `count` values from -1 (none) to `limit` - 1."""
    if isinstance(ids, Tensor):
        ids = tensor_as_array(ids, field, f"1-D integers, one per {per}")
    try:
        array = np.asarray(ids) if len(ids) else np.empty(0, np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(field, type(ids).__name__, f"1-D integers, one per {per}: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ArgumentError(field, f"{array.dtype} of shape {array.shape}", f"1-D integers, one per {per}")
    if len(array) != count:
        raise ArgumentError(field, f"{len(array)} entries", f"{count}, one per {per}")
    if count:
        low, high = int(array.min()), int(array.max())
        if low < -1 or high >= limit:
            at = int(np.argmin(array) if low < -1 else np.argmax(array))
            got = f"{low if low < -1 else high} at {at}"
            raise ArgumentError(field, got, f"-1 (none) or 0 … {limit - 1}, of which there are {limit}")
    return torch.from_numpy(
        np.array(array, np.int64)
    )  # a copy: an operation under way must not see later changes


def checked_keys(keys: Any, field: str = "keys") -> list[bytes]:
    """`keys` as a list of at least one chunk key."""
    if isinstance(keys, (bytes, str)) or not isinstance(keys, Sequence):
        raise ArgumentError(field, type(keys).__name__, f"a sequence of keys of {KEY_BYTES} bytes")
    if not len(keys):
        raise ArgumentError(field, "none", "at least one key")
    return [checked_key(key, f"{field}[{at}]") for at, key in enumerate(keys)]


def checked_key(key: Any, field: str) -> bytes:
    """`key` if it is a chunk key."""
    if not isinstance(key, bytes):
        raise ArgumentError(field, type(key).__name__, f"bytes, {KEY_BYTES} of them")
    if len(key) != KEY_BYTES:
        raise ArgumentError(field, f"{len(key)} bytes", f"{KEY_BYTES} bytes")
    return key


def checked_tensors(kvcaches: Any) -> list[Tensor] | None:
    """The tensors in `kvcaches`; None if something in it is none (whoever describes them says what)."""
    if isinstance(kvcaches, Tensor):
        return [kvcaches]
    if isinstance(kvcaches, Mapping):
        kvcaches = list(kvcaches.values())
    if not isinstance(kvcaches, Sequence) or isinstance(kvcaches, (str, bytes)):
        wanted = "the paged tensors: one per layer (a list, or a mapping by layer name) or one for all layers"
        raise ArgumentError("kvcaches", type(kvcaches).__name__, wanted)
    tensors = [tensor for tensor in kvcaches if isinstance(tensor, Tensor)]
    return tensors if len(tensors) == len(kvcaches) else None


def check_identity(layout: Any, model: Any, tiers: Any) -> None:
    """Raise ArgumentError unless these say whose chunks an engine moves and where else they may be."""
    if not isinstance(layout, KVLayout):
        raise ArgumentError("layout", type(layout).__name__, "a KVLayout")
    if not isinstance(model, str) or not model:
        raise ArgumentError("model", repr(model), "the identity of the model: text that is not empty")
    if not isinstance(tiers, Sequence):
        wanted = "a sequence of Tiers, the fastest first; settings are given as **{'tiers.policy': …}"
        raise ArgumentError("tiers", type(tiers).__name__, wanted)
    for at, tier in enumerate(tiers):
        if not isinstance(tier, Tier):
            raise ArgumentError(f"tiers[{at}]", type(tier).__name__, "a Tier (vcache.tiers.Tier)")


def loaded_config(config: Any, overrides: dict[str, Any]) -> Config:
    """The configuration given, or the one that `overrides` load. Raises ArgumentError, ConfigError."""
    if config is None:
        return load(**overrides).config
    if overrides:
        raise ArgumentError(
            "config", f"one, and {', '.join(sorted(overrides))} as well", "the one or the others"
        )
    if not isinstance(config, Config):
        raise ArgumentError("config", type(config).__name__, "a vcache.config.Config, as `load` makes it")
    return config
