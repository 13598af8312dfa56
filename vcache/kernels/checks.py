"""What every kernel asks of its arguments, checked before anything is copied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vcache.errors import ArgumentError
from vcache.kernels.base import PagedKV


def check_slots(paged: PagedKV, slots: Tensor, tokens: int) -> None:
    """Raise ArgumentError unless `slots` are `tokens` int64 values from -1 (padding) to `paged.num_slots` -
    1.

    On a GPU this waits for the values, so callers that know them on the CPU pass them from there.
    """
    _check_ids("slot_mapping", slots, tokens, paged.num_slots, "slots")


def check_pages(paged: PagedKV, pages: Tensor, count: int) -> None:
    """Raise ArgumentError unless `pages` are `count` int64 values from -1 (none) to `paged.num_pages` - 1."""
    _check_ids("pages", pages, count, paged.num_pages, "pages")


def _check_ids(field: str, ids: Tensor, count: int, limit: int, what: str) -> None:
    if not isinstance(ids, Tensor):
        raise ArgumentError(field, type(ids).__name__, "a torch.Tensor")
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ArgumentError(field, f"{ids.dtype} of shape {tuple(ids.shape)}", "1-D torch.int64")
    if ids.numel() != count:
        raise ArgumentError(field, f"{len(ids)} entries", f"{count}, one per {what[:-1]} of the chunks")
    if not count:
        return
    low, high = _extremes(ids)
    if low < -1 or high >= limit:
        wanted = f"-1 (none) or 0 … {limit - 1}: there are {limit} {what}"
        raise ArgumentError(field, low if low < -1 else high, wanted)


def _extremes(ids: Tensor) -> tuple[int, int]:
    if ids.is_cpu:
        numbers = ids.numpy()  # which copies nothing, and reduces a few numbers in a tenth of torch's time
        return int(numbers.min()), int(numbers.max())
    low, high = torch.aminmax(ids)
    return int(low), int(high)


def check_chunks(paged: PagedKV, chunks: Sequence[Tensor], unit_bytes: int) -> int:
    """How many tokens (or pages) of `unit_bytes` the chunks hold.

    Raises ArgumentError unless each is a contiguous 1-D uint8 tensor of a whole chunk on the right kind of
    device; the last one may hold fewer.
    """
    # Of every chunk: `device.type` and `len` cost much more than what is asked here instead.
    size, total = paged.layout.chunk_bytes, 0
    device, aligned_to = paged.device, paged.layers[0].element_size()
    for index, chunk in enumerate(chunks):
        if not isinstance(chunk, Tensor):
            raise ArgumentError(f"chunks[{index}]", type(chunk).__name__, "a torch.Tensor")
        if chunk.dtype != torch.uint8 or chunk.dim() != 1 or not chunk.is_contiguous():
            got = f"{chunk.dtype} of shape {tuple(chunk.shape)}"
            raise ArgumentError(f"chunks[{index}]", got, "contiguous 1-D torch.uint8")
        if chunk.device != device and chunk.device.type != device.type:
            raise ArgumentError(
                f"chunks[{index}].device", chunk.device, f"{device.type}, where the pages are"
            )
        if chunk.data_ptr() % aligned_to:
            raise ArgumentError(
                f"chunks[{index}]", f"address {chunk.data_ptr():#x}", "an address aligned to the elements"
            )
        length = chunk.numel()
        last = index == len(chunks) - 1
        if length != size and not (last and 0 < length < size and length % unit_bytes == 0):
            wanted = f"{size} bytes" + (
                f", or fewer in steps of {unit_bytes}, for it is the last" if last else ""
            )
            raise ArgumentError(f"chunks[{index}]", f"{length} bytes", wanted)
        total += length // unit_bytes
    return total


def check_layers(paged: PagedKV, layers: range | None) -> None:
    """Raise ArgumentError unless `layers` is None or an ascending range, without gaps, of layers that are
    there.
    """
    if layers is None:
        return
    count = len(paged.layers)
    if not isinstance(layers, range) or layers.step != 1 or not 0 <= layers.start < layers.stop <= count:
        raise ArgumentError("layers", repr(layers), f"a range of step 1 within range(0, {count}), not empty")


def check_form(paged: PagedKV, form: str) -> None:
    """Raise ArgumentError unless the paged KV was described for chunks of that form."""
    if paged.layout.form != form:
        raise ArgumentError("paged.layout.form", repr(paged.layout.form), f"{form!r} for this call")
