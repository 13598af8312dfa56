"""Gather and scatter in plain torch, on any device: the definition that every other kernel must equal, bit
for bit.

Arguments are checked by the caller (`vcache.kernels`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from vcache.kernels.base import PagedKV


def gather(paged: PagedKV, ids: Tensor, chunks: Sequence[Tensor], layers: range | None = None) -> None:
    """Copy the slots (tokens form) or pages (pages form) `ids` into the chunks; zero where an id is -1.

    layers: the layers that are copied, all by default.
    """
    for chunk, part in _parts(paged, ids, chunks):
        none = part < 0
        pieces = _layers_of(paged, chunk, len(part))
        for number in all_layers(paged) if layers is None else layers:
            found = paged.layers[number][_at(paged, part.clamp(min=0))]
            found[(slice(None), none) if paged.layout.form == "tokens" else none] = 0
            pieces[number].copy_(found)


def scatter(paged: PagedKV, ids: Tensor, chunks: Sequence[Tensor], layers: range | None = None) -> None:
    """Copy the chunks to the slots (tokens form) or pages (pages form) `ids`; skip where an id is -1.

    Which value stays where an id comes twice is not defined. layers: as for `gather`.
    """
    for chunk, part in _parts(paged, ids, chunks):
        kept = part >= 0
        pieces = _layers_of(paged, chunk, len(part))
        for number in all_layers(paged) if layers is None else layers:
            layer, piece = paged.layers[number], pieces[number]
            source = piece[:, kept] if paged.layout.form == "tokens" else piece[kept]
            layer[_at(paged, part[kept])] = source.to(layer.device)


def all_layers(paged: PagedKV) -> range:
    """The layers of a copy that is not restricted to some."""
    return range(len(paged.layers))


def _at(paged: PagedKV, ids: Tensor) -> tuple[slice | Tensor, ...]:
    if paged.layout.form == "pages":
        return (ids,)
    return slice(None), ids // paged.page_tokens, ids % paged.page_tokens


def _parts(paged: PagedKV, ids: Tensor, chunks: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each chunk with its part of the ids."""
    ids = ids.to(paged.device)
    begin = 0
    for chunk in chunks:
        count = len(chunk) // unit_bytes(paged)
        yield chunk, ids[begin : begin + count]
        begin += count


def unit_bytes(paged: PagedKV) -> int:
    """Bytes that one id stands for, all layers: a token's or a page's."""
    layout = paged.layout
    return layout.num_layers * layout.page_bytes if layout.form == "pages" else layout.token_bytes


def _layers_of(paged: PagedKV, chunk: Tensor, count: int) -> Tensor:
    """The chunk as `[l, k, token, h, d]`, or in the pages form as `[l, page, …]`."""
    layout, like = paged.layout, paged.layers[0]
    elements = chunk.view(like.dtype)
    if layout.form == "pages":
        return elements.view(layout.num_layers, count, *like.shape[1:])
    return elements.view(layout.num_layers, layout.kv_parts, count, layout.num_kv_heads, layout.head_size)
