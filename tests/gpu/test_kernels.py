"""The kernels on a GPU: every layout, dtype and order, bit for bit against the definition (-m gpu)."""

from __future__ import annotations

import pytest
import torch

from tests.kernels_common import (
    DTYPES,
    LATENT_AXES,
    TOKEN_AXES,
    bits,
    chunks_for,
    latent_layout,
    same,
    tensors,
    token_layout,
)
from tests.test_kernels import ORDERS, PAGE_AXES, PAGE_ORDERS, page_layout
from vcache.kernels import (
    LaunchOptions,
    PagedKV,
    copy_engine,
    gather_pages,
    gather_tokens,
    prepare,
    reference,
    scatter_pages,
    scatter_tokens,
)
from vcache.layout import KVLayout

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda:0")


def on_gpu(kvcaches: list[torch.Tensor], axes: str, layout: KVLayout) -> PagedKV:
    return PagedKV.from_tensors([tensor.to(GPU) for tensor in kvcaches], axes, layout)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("axes", [*TOKEN_AXES, *LATENT_AXES])
def test_tokens_equal_the_definition(axes: str, order: str) -> None:
    layout = latent_layout() if axes in LATENT_AXES else token_layout()
    check_tokens(axes, layout, ORDERS[order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [0, 1, 7])
def test_every_dtype_with_and_without_a_limit(dtype: str, limit: int) -> None:
    check_tokens("phs(kd)", token_layout(dtype), ORDERS["holes"], LaunchOptions(sm_limit=limit))


def check_tokens(
    axes: str, layout: KVLayout, slots: torch.Tensor, options: LaunchOptions | None = None
) -> None:
    options = options or LaunchOptions()
    kvcaches, others = tensors(axes, layout), tensors(axes, layout, 50)
    plain, target = (PagedKV.from_tensors(each, axes, layout) for each in (kvcaches, others))
    paged, loaded = on_gpu(kvcaches, axes, layout), on_gpu(others, axes, layout)
    wanted = chunks_for(plain, len(slots))
    chunks = [chunk.to(GPU) for chunk in wanted]
    gather_tokens(paged, slots, chunks, None, options)
    reference.gather(plain, slots, wanted)
    assert same([chunk.cpu() for chunk in chunks], wanted)
    scatter_tokens(loaded, slots.to(GPU), chunks, None, options)
    reference.scatter(target, slots, wanted)
    assert same([layer.cpu() for layer in loaded.layers], bits(target))


@pytest.mark.parametrize("order", PAGE_ORDERS)
@pytest.mark.parametrize("axes", PAGE_AXES)
@pytest.mark.parametrize("by", ["kernel", "copy engine"])
def test_pages_equal_the_definition(axes: str, order: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_engine, "PIECE_BYTES_MIN", 1 if by == "copy engine" else 1 << 40)
    layout, kvcaches = page_layout(axes)
    pages = PAGE_ORDERS[order]
    plain, target = (
        PagedKV.from_tensors([tensor.clone() for tensor in kvcaches], axes, layout) for _ in range(2)
    )
    paged, loaded = (on_gpu(kvcaches, axes, layout) for _ in range(2))
    wanted = chunks_for(plain, len(pages) * layout.page_tokens)
    chunks = [chunk.to(GPU) for chunk in wanted]
    gather_pages(paged, pages, chunks)
    reference.gather(plain, pages, wanted)
    assert same([chunk.cpu() for chunk in chunks], wanted)
    scatter_pages(loaded, pages.flip(0), chunks)
    reference.scatter(target, pages.flip(0), wanted)
    assert same([layer.cpu() for layer in loaded.layers], bits(target))


def test_no_kernel_is_compiled_after_registration() -> None:
    from vcache.kernels.triton_copy import copy_words

    paged = on_gpu(tensors("kpshd", token_layout()), "kpshd", token_layout())
    prepare(paged)
    compiled = len(copy_words.device_caches[0][0])
    for slots in (
        ORDERS["page order"],
        ORDERS["holes"],
        ORDERS["one token"],
        ORDERS["a partial chunk at random"],
    ):
        for options in (LaunchOptions(), LaunchOptions(sm_limit=16)):
            chunks = [chunk.to(GPU) for chunk in chunks_for(paged, len(slots))]
            gather_tokens(paged, slots, chunks, None, options)
            scatter_tokens(paged, slots, chunks, range(1, 2), options)
    assert len(copy_words.device_caches[0][0]) == compiled
