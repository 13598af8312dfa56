"""`PagedKV`: an engine's paged KV cache, described by its axes and strides and not by the engine's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vcache.errors import ArgumentError
from vcache.kernels.axes import parse_axes, require_axes
from vcache.layout import KVLayout

# Bits are moved, never numbers: integers of the same width have no NaN to touch, and every operator knows
# them.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class PagedKV:
    """The paged KV cache of one engine process, as views of its tensors; it owns and copies nothing.

    layout: what a chunk of it is.
    layers: one view per layer, of integers as wide as the elements. In the tokens form `[k, p, s, h, d]`; in
        the pages form `[p, …]`, the rest in the order of memory. Strides are the tensors' own.
    num_pages, page_tokens, num_slots: slot `i` is token `i % page_tokens` of page `i // page_tokens`.
    page_axes: pages form: the order of a page's bytes, slowest first, such as `hs(kd)`; without axes of
    length 1.
    device: where all of it lies.
    """

    __slots__ = ("__weakref__", "device", "layers", "layout", "num_pages", "page_axes", "page_tokens")

    def __init__(
        self, layout: KVLayout, layers: Sequence[Tensor], page_tokens: int, page_axes: str = ""
    ) -> None:
        self.layout = layout
        self.layers = tuple(layers)
        self.page_tokens = page_tokens
        self.page_axes = page_axes
        self.num_pages = self.layers[0].shape[0 if layout.form == "pages" else 1]
        self.device = self.layers[0].device

    @property
    def num_slots(self) -> int:
        """Tokens that fit: the slots are 0 … num_slots - 1."""
        return self.num_pages * self.page_tokens

    @classmethod
    def from_tensors(
        cls, kvcaches: Sequence[Tensor] | Mapping[str, Tensor] | Tensor, axes: str, layout: KVLayout
    ) -> PagedKV:
        """Describe `kvcaches`: one tensor per layer, in order, or one for all layers (its axes contain `l`).

        `axes` spells the dimensions, see `vcache.kernels.axes`: vLLM's (2, B, N, H, D) is `kpshd`,
        (B, 2, N, H, D) `pkshd`, their HND forms `kphsd` and `pkhsd`, (B, H, N, 2·D) `phs(kd)`, MLA's (B, N,
        D) `psd`. Any strides will do. Raises ArgumentError, naming the tensor, where dtype, shape or device
        disagree with the layout or each other.
        """
        groups = parse_axes(axes)
        if layout.form == "tokens":
            require_axes(groups, axes, "psd", "lkpshd")
        named = _named_tensors(kvcaches, layout, stacked="l" in groups)
        for name, tensor in named:
            _check_like(name, tensor, named[0][1], axes, groups)
            _check_dtype(name, tensor, layout, groups)
        views = [tensor.detach().view(_WORDS[tensor.element_size()]) for _, tensor in named]
        if layout.form == "pages":
            return _paged_pages(cls, named[0][0], views, axes, groups, layout)
        return _paged_tokens(cls, named[0][0], views, axes, groups, layout)


def _named_tensors(
    kvcaches: Sequence[Tensor] | Mapping[str, Tensor] | Tensor, layout: KVLayout, *, stacked: bool
) -> list[tuple[str, Tensor]]:
    if isinstance(kvcaches, Tensor):
        named = [("kvcaches", kvcaches)]
    elif isinstance(kvcaches, Mapping):
        named = [(f"kvcaches[{name!r}]", tensor) for name, tensor in kvcaches.items()]
    else:
        named = [(f"kvcaches[{index}]", tensor) for index, tensor in enumerate(kvcaches)]
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise ArgumentError(name, type(tensor).__name__, "a torch.Tensor")
    count = 1 if stacked else layout.num_layers
    if len(named) != count:
        wanted = (
            "one, since the axes contain 'l'"
            if stacked
            else f"{count}, one per layer (or 'l' among the axes)"
        )
        raise ArgumentError("kvcaches", f"{len(named)} tensors", wanted)
    return named


def _check_like(name: str, tensor: Tensor, first: Tensor, axes: str, groups: tuple[str, ...]) -> None:
    if tensor.dim() != len(groups):
        wanted = f"{len(groups)} dimensions, as the axes {axes!r} say"
        raise ArgumentError(f"{name}.shape", tuple(tensor.shape), wanted)
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ArgumentError(
            f"{name}.layout", f"{tensor.layout} on {tensor.device}", "a dense tensor with memory"
        )
    for field in ("dtype", "device", "shape"):
        got, wanted = getattr(tensor, field), getattr(first, field)
        if got != wanted:
            raise ArgumentError(f"{name}.{field}", got, f"{wanted}, as the first tensor has")


def _check_dtype(name: str, tensor: Tensor, layout: KVLayout, groups: tuple[str, ...]) -> None:
    if "b" in groups:
        if tensor.dtype not in (torch.uint8, torch.int8):
            raise ArgumentError(f"{name}.dtype", tensor.dtype, "uint8 or int8, for the axis 'b' counts bytes")
    elif tensor.dtype != getattr(torch, layout.dtype):
        raise ArgumentError(f"{name}.dtype", tensor.dtype, f"torch.{layout.dtype}, as the layout says")


def _paged_tokens(
    cls: type[PagedKV], name: str, views: list[Tensor], axes: str, groups: tuple[str, ...], layout: KVLayout
) -> PagedKV:
    """Bring every layer's view to `[k, p, s, h, d]`: split, permute, add what is missing; never copy."""
    sizes = {"l": layout.num_layers, "k": layout.kv_parts, "h": layout.num_kv_heads, "d": layout.head_size}
    for axis, group in enumerate(groups):
        wanted = 1
        for letter in group:
            wanted *= sizes.get(letter, views[0].shape[axis])
        if views[0].shape[axis] != wanted:
            text = f"{wanted} at axis {axis} ({group}), as the layout says"
            raise ArgumentError(f"{name}.shape", tuple(views[0].shape), text)
    for letter in "kh":
        if letter not in "".join(groups) and sizes[letter] != 1:
            raise ArgumentError(
                "axes", repr(axes), f"an axis {letter!r} of {sizes[letter]}, as the layout says"
            )
    layers = [_canonical(view, groups, sizes) for view in views]
    if "l" in groups:
        layers = list(layers[0].unbind(0))
    else:
        layers = [layer[0] for layer in layers]
    page_tokens = layers[0].shape[2]
    if not layers[0].numel():
        raise ArgumentError(
            f"{name}.shape", tuple(views[0].shape), "at least one page with at least one slot"
        )
    return cls(layout, layers, page_tokens)


def _canonical(view: Tensor, groups: tuple[str, ...], sizes: dict[str, int]) -> Tensor:
    """`[l, k, p, s, h, d]`, with length 1 where an axis is missing."""
    for axis in reversed(range(len(groups))):
        if len(groups[axis]) > 1:
            split = [sizes[letter] for letter in groups[axis]]
            view = view.view(*view.shape[:axis], *split, *view.shape[axis + 1 :])
    letters = "".join(groups)
    for letter in "lkh":
        if letter not in letters:
            view, letters = view.unsqueeze(0), letter + letters
    return view.permute([letters.index(letter) for letter in "lkpshd"])


def _paged_pages(
    cls: type[PagedKV], name: str, views: list[Tensor], axes: str, groups: tuple[str, ...], layout: KVLayout
) -> PagedKV:
    """Bring every layer's view to `[p, …]`, a page's inside in the order of memory: the largest copies."""
    stacked = "l" in groups and layout.num_layers > 1
    if stacked:
        axis = groups.index("l")
        if views[0].shape[axis] != layout.num_layers:
            wanted = f"{layout.num_layers} at axis {axis} (l), as the layout says"
            raise ArgumentError(f"{name}.shape", tuple(views[0].shape), wanted)
        views = list(views[0].unbind(axis))
        groups = groups[:axis] + groups[axis + 1 :]
    first = views[0]
    if "s" in groups and first.shape[groups.index("s")] != layout.page_tokens:
        wanted = f"pages of {layout.page_tokens} tokens, as the layout says"
        raise ArgumentError(f"{name}.shape", tuple(first.shape), wanted)
    pages = first.shape[groups.index("p")]
    page_bytes = first.numel() // pages * first.element_size() if pages else 0
    if page_bytes != layout.page_bytes:
        wanted = f"pages of {layout.page_bytes} bytes, as the layout says; it has {pages} of {page_bytes}"
        raise ArgumentError(f"{name}.shape", tuple(first.shape), wanted)
    orders = {_memory_order(view, groups) for view in views}
    if len(orders) > 1:
        raise ArgumentError(
            "kvcaches", f"pages of the orders {sorted(orders)}", "the same order of memory in every layer"
        )
    order = orders.pop()
    page_axes = "".join(f"({groups[axis]})" if len(groups[axis]) > 1 else groups[axis] for axis in order)
    _check_page_format(page_axes, layout)
    layers = [view.permute(groups.index("p"), *order, *_length_one(view, groups, order)) for view in views]
    return cls(layout, layers, layout.page_tokens, page_axes)


def _memory_order(view: Tensor, groups: tuple[str, ...]) -> tuple[int, ...]:
    """The axes inside a page that are longer than 1, slowest first."""
    inner = [axis for axis, group in enumerate(groups) if group != "p" and view.shape[axis] > 1]
    return tuple(sorted(inner, key=view.stride().__getitem__, reverse=True))


def _length_one(view: Tensor, groups: tuple[str, ...], order: tuple[int, ...]) -> list[int]:
    return [axis for axis in range(view.dim()) if groups[axis] != "p" and axis not in order]


def _check_page_format(page_axes: str, layout: KVLayout) -> None:
    for word in layout.page_format.split():
        if word.startswith("axes=") and word != f"axes={page_axes}":
            raise ArgumentError(
                "layout.page_format", repr(word), f"'axes={page_axes}', as the tensors lie in memory"
            )
