"""From what callers pass to what is moved: chunk keys, slots or pages, a description of the tensors."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vcache.engine.arguments import (
    Transfer,
    checked_ids,
    checked_key,
    checked_keys,
    checked_tensors,
    checked_tokens,
    masked_tokens,
)
from vcache.engine.lanes import Lanes
from vcache.errors import ArgumentError
from vcache.kernels import PagedKV, prepare
from vcache.kernels.axes import parse_axes
from vcache.keys import KeyChain
from vcache.layout import KVLayout
from vcache.limits import PAGED_KV_DESCRIBED_MAX


class Transfers:
    """Makes transfers for one layout and chain of keys. Thread-safe; what is wrong raises ArgumentError.

    lanes: whose callers' queued work a transfer waits for. partial: whether a last chunk that is not full
    counts.
    """

    def __init__(
        self, layout: KVLayout, chain: KeyChain, axes: str, lanes: Lanes | None = None, *, partial: bool
    ) -> None:
        parse_axes(axes)
        self._layout = layout
        self._chain = chain
        self._lanes = lanes or Lanes()
        self._partial = partial
        self._described = DescribedTensors(axes, layout)

    def keys(self, tokens: NDArray[np.int64]) -> list[bytes]:
        """The keys of the chunks of `tokens`."""
        return self._chain.keys(tokens, self._layout.chunk_tokens, partial=self._partial)

    def bound_keys(self, keys: Any) -> list[bytes]:
        """The chunk keys that stand for an engine's own keys."""
        return [self._chain.bind(key) for key in checked_keys(keys)]

    def bound_key(self, key: Any, field: str) -> bytes:
        """`key` as the pool knows it: a chunk key in the tokens form, an engine's own in the pages form."""
        checked = checked_key(key, field)
        return checked if self._layout.form == "tokens" else self._chain.bind(checked)

    def of_tokens(
        self, tokens: Any, *, mask: Any, offset: Any, kvcaches: Any, slot_mapping: Any
    ) -> tuple[Transfer, NDArray[np.bool_], int]:
        """The chunks behind the masked prefix; of each token, whether it has a slot; how many are masked."""
        array = checked_tokens(tokens)
        chunk_tokens = self._layout.chunk_tokens
        masked = masked_tokens(mask, offset, len(array), chunk_tokens)
        paged = self._described.describe(kvcaches)
        slots = checked_ids("slot_mapping", slot_mapping, len(array), paged.num_slots, "token")
        keys = self.keys(array)[masked // chunk_tokens :]
        end = min(masked + len(keys) * chunk_tokens, len(array))
        sizes = [self._layout.chunk_bytes] * len(keys)
        if keys and (end - masked) % chunk_tokens:
            sizes[-1] = self._layout.bytes_for((end - masked) % chunk_tokens)
        after = self._lanes.on(paged.device).caller()
        transfer = Transfer(paged, keys, sizes, slots[masked:end], chunk_tokens, after)
        return transfer, slots.numpy() >= 0, masked

    def of_pages(self, keys: Any, *, kvcaches: Any, pages: Any) -> Transfer:
        """Whole chunks, given by the engine's own keys, of `pages_per_chunk` pages each."""
        checked = self.bound_keys(keys)
        paged = self._described.describe(kvcaches)
        per_chunk = self._layout.pages_per_chunk
        per = f"page, {per_chunk} per key"
        ids = checked_ids("pages", pages, len(checked) * per_chunk, paged.num_pages, per)
        after = self._lanes.on(paged.device).caller()
        return Transfer(paged, checked, [self._layout.chunk_bytes] * len(checked), ids, per_chunk, after)

    def prepare(self, kvcaches: Any) -> None:
        """Describe tensors, and make now what their first copy would have to make."""
        prepare(self._described.describe(kvcaches))

    def require_form(self, form: str, instead: str) -> None:
        """Raise ArgumentError unless the layout has this form; `instead`: what the other one calls."""
        if self._layout.form != form:
            wanted = f"{form!r} for this call; for {self._layout.form!r} there is {instead}"
            raise ArgumentError("layout.form", repr(self._layout.form), wanted)

    def forget(self) -> None:
        """Let go of all tensors."""
        self._described.forget()


class DescribedTensors:
    """`PagedKV.from_tensors` with a memory of the last PAGED_KV_DESCRIBED_MAX sets of tensors. Thread-safe.

    A description keeps its tensors alive, so an address in it cannot come to mean other tensors.
    """

    def __init__(self, axes: str, layout: KVLayout) -> None:
        self._axes = axes
        self._layout = layout
        self._known: OrderedDict[Hashable, PagedKV] = OrderedDict()
        self._lock = threading.Lock()

    def describe(self, kvcaches: Any) -> PagedKV:
        """The description of `kvcaches`. Raises ArgumentError naming the tensor that does not fit."""
        tensors = checked_tensors(kvcaches)
        if tensors is None:
            return PagedKV.from_tensors(kvcaches, self._axes, self._layout)
        identity = (isinstance(kvcaches, Tensor), *map(_identity, tensors))
        with self._lock:
            known = self._known.get(identity)
            if known is not None:
                self._known.move_to_end(identity)
                return known
        made = PagedKV.from_tensors(kvcaches, self._axes, self._layout)
        with self._lock:
            self._known[identity] = made
            while len(self._known) > PAGED_KV_DESCRIBED_MAX:
                self._known.popitem(last=False)
        return made

    def forget(self) -> None:
        """Let go of all tensors."""
        with self._lock:
            self._known.clear()


def _identity(tensor: Tensor) -> Hashable:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
        return object()  # without an address: whoever describes it refuses it
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
