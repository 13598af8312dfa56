"""What gather, scatter and `PagedKV.from_tensors` refuse, and in which words."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels_common import (
    CHUNK_TOKENS,
    PAGE_TOKENS,
    PAGES,
    bits,
    chunks_for,
    latent_layout,
    paged_kv,
    same,
    tensors,
    token_layout,
)
from vcache.errors import ArgumentError
from vcache.kernels import PagedKV, check_slots, gather_pages, gather_tokens, scatter_tokens
from vcache.kernels.axes import parse_axes
from vcache.kernels.threads import spread
from vcache.layout import KVLayout

LAYOUT = token_layout()
SLOTS = torch.arange(CHUNK_TOKENS)


def page_layout(**change: Any) -> KVLayout:
    fields = {"form": "pages", "page_tokens": PAGE_TOKENS, "page_bytes": 512, "page_format": "test"}
    return token_layout(**{**fields, **change})


def changed(index: int, tensor: Tensor) -> list[Tensor]:
    kvcaches = tensors("kpshd", LAYOUT)
    kvcaches[index] = tensor
    return kvcaches


def refused(kvcaches: Any, axes: str, layout: KVLayout, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        PagedKV.from_tensors(kvcaches, axes, layout)


def test_axes_are_parsed() -> None:
    assert parse_axes("p h s (k d)") == ("p", "h", "s", "kd")
    assert parse_axes("kpshd") == ("k", "p", "s", "h", "d")


@pytest.mark.parametrize(
    "axes", ["", "kpshx", "kkpsd", "k-psd", "phs(kd", "phs(k)", "phs kd)", "kshd", "(kp)shd", "KPSHD"]
)
def test_axes_that_mean_nothing_are_refused(axes: str) -> None:
    refused(tensors("kpshd", LAYOUT), axes, LAYOUT, "^axes: got ")


def test_axes_that_the_layout_does_not_have_are_refused() -> None:
    refused(tensors("kpshd", LAYOUT), "kpsd", LAYOUT, r"kvcaches\[0\].shape: .* wanted 4 dimensions")
    refused([tensor[0] for tensor in tensors("kpshd", LAYOUT)], "pshd", LAYOUT, "axes: .* an axis 'k' of 2")
    refused(
        [tensor[..., 0, :] for tensor in tensors("kpshd", LAYOUT)],
        "kpsd",
        LAYOUT,
        "axes: .* an axis 'h' of 2",
    )
    refused(
        tensors("psd", latent_layout()), "psd", LAYOUT, r"kvcaches\[0\].shape: .* wanted 16 at axis 2 \(d\)"
    )
    refused([tensor[0, :, :, 0, 0] for tensor in tensors("kpshd", LAYOUT)], "pb", LAYOUT, "axes: got 'pb'")


@pytest.mark.parametrize(
    ("index", "tensor", "words"),
    [
        (0, torch.zeros(2, 24, 4, 2, 16), r"kvcaches\[0\].dtype: got torch.float32, wanted torch.bfloat16"),
        (2, torch.zeros(2, 24, 4, 2, 16), r"kvcaches\[2\].dtype: got torch.float32, wanted torch.bfloat16"),
        (1, torch.zeros(2, 25, 4, 2, 16, dtype=torch.bfloat16), r"kvcaches\[1\].shape: got .*25"),
        (1, torch.zeros(2, 24, 4, 32, dtype=torch.bfloat16), r"kvcaches\[1\].shape: got .*5 dimensions"),
        (
            1,
            torch.zeros(2, 24, 4, 2, 16, dtype=torch.bfloat16, device="meta"),
            r"kvcaches\[1\].layout: got .*meta",
        ),
    ],
)
def test_tensors_that_disagree_are_named(index: int, tensor: Tensor, words: str) -> None:
    refused(changed(index, tensor), "kpshd", LAYOUT, words)


def test_wrong_sizes_are_named() -> None:
    refused(
        tensors("kphsd", LAYOUT), "kpshd", LAYOUT, r"kvcaches\[0\].shape: got .* wanted 2 at axis 3 \(h\)"
    )
    refused(tensors("phs(kd)", token_layout(head_size=8)), "phs(kd)", LAYOUT, r"wanted 32 at axis 3 \(kd\)")
    refused(tensors("kpshd", LAYOUT, pages=0), "kpshd", LAYOUT, "wanted at least one page")


def test_wrong_numbers_of_tensors_are_named() -> None:
    kvcaches = tensors("kpshd", LAYOUT)
    refused(kvcaches[:2], "kpshd", LAYOUT, "kvcaches: got 2 tensors, wanted 3, one per layer")
    refused(kvcaches[0], "kpshd", LAYOUT, "kvcaches: got 1 tensors, wanted 3")
    refused(tensors("lkpshd", LAYOUT) * 2, "lkpshd", LAYOUT, "kvcaches: got 2 tensors, wanted one")
    refused([1, 2, 3], "kpshd", LAYOUT, r"kvcaches\[0\]: got int, wanted a torch.Tensor")


def test_tensors_may_have_names() -> None:
    kvcaches = tensors("kpshd", LAYOUT)
    named = {f"layers.{index}": tensor for index, tensor in enumerate(kvcaches)}
    paged = PagedKV.from_tensors(named, "kpshd", LAYOUT)
    assert same(list(paged.layers), list(paged_kv("kpshd", LAYOUT).layers))
    named["layers.1"] = kvcaches[1].float()
    refused(named, "kpshd", LAYOUT, r"kvcaches\['layers.1'\].dtype: got torch.float32")


def test_a_paged_kv_says_what_it_is() -> None:
    paged = paged_kv("phs(kd)", LAYOUT)
    assert (paged.num_pages, paged.page_tokens, paged.num_slots) == (PAGES, PAGE_TOKENS, PAGES * PAGE_TOKENS)
    assert paged.device == torch.device("cpu")
    assert paged.layers[0].shape == (2, PAGES, PAGE_TOKENS, 2, 16)


def test_pages_that_are_not_the_layouts_are_refused() -> None:
    kvcaches = tensors("pkshd", LAYOUT)  # 2 × 4 × 2 × 16 × 2 bytes
    PagedKV.from_tensors(kvcaches, "pkshd", page_layout())
    refused(
        kvcaches, "pkshd", page_layout(page_bytes=500), r"kvcaches\[0\].shape: .* wanted pages of 500 bytes"
    )
    refused(
        kvcaches, "pkshd", page_layout(page_tokens=8), r"kvcaches\[0\].shape: .* wanted pages of 8 tokens"
    )
    refused(kvcaches, "pkshd", page_layout(dtype="float16"), r"kvcaches\[0\].dtype: .* wanted torch.float16")
    refused(
        tensors("lpkshd", LAYOUT), "lpkshd", page_layout(num_layers=2, page_bytes=768), "wanted 2 at axis 0"
    )
    refused([tensor.flatten(1) for tensor in kvcaches], "pb", page_layout(), "wanted uint8 or int8")
    mixed = [kvcaches[0], *(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in kvcaches[1:])]
    refused(mixed, "pkshd", page_layout(), "kvcaches: got pages of the orders")


def test_the_order_of_pages_is_compared_with_the_page_format() -> None:
    kvcaches = tensors("pkshd", LAYOUT)
    PagedKV.from_tensors(kvcaches, "pkshd", page_layout(page_format="SOME_BACKEND axes=kshd"))
    other = page_layout(page_format="SOME_BACKEND axes=khsd")
    refused(kvcaches, "pkshd", other, "layout.page_format: got 'axes=khsd', wanted 'axes=kshd'")


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        (SLOTS.int(), "slot_mapping: got torch.int32 of shape .*, wanted 1-D torch.int64"),
        (SLOTS[None], "slot_mapping: got torch.int64 of shape"),
        (SLOTS[:-1], "slot_mapping: got 15 entries, wanted 16, one per slot of the chunks"),
        (SLOTS + PAGES * PAGE_TOKENS, "slot_mapping: got 111, wanted -1 .* 0 … 95"),
        (SLOTS - 2, "slot_mapping: got -2, wanted -1"),
        (SLOTS.tolist(), "slot_mapping: got list, wanted a torch.Tensor"),
    ],
)
def test_wrong_slots_are_refused_before_anything_is_copied(slots: Any, words: str) -> None:
    paged = paged_kv("kpshd", LAYOUT)
    before, chunks = bits(paged), chunks_for(paged, CHUNK_TOKENS)
    old = chunks[0].clone()
    for call in (gather_tokens, scatter_tokens):
        with pytest.raises(ArgumentError, match=words):
            call(paged, slots, chunks)
    with pytest.raises(ArgumentError, match="slot_mapping"):
        check_slots(paged, slots, CHUNK_TOKENS)
    assert same(bits(paged), before)
    assert torch.equal(chunks[0], old)


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([b"abc"], r"chunks\[0\]: got bytes, wanted a torch.Tensor"),
        ([torch.zeros(LAYOUT.chunk_bytes, dtype=torch.int8)], r"chunks\[0\]: got torch.int8"),
        (
            [torch.zeros(2, LAYOUT.chunk_bytes, dtype=torch.uint8)],
            r"chunks\[0\]: got .* wanted contiguous 1-D",
        ),
        (
            [torch.zeros(2 * LAYOUT.chunk_bytes, dtype=torch.uint8)[::2]],
            r"chunks\[0\]: got .* wanted contiguous",
        ),
        (
            [torch.zeros(LAYOUT.chunk_bytes + 1, dtype=torch.uint8)],
            r"chunks\[0\]: got 6145 bytes, wanted 6144",
        ),
        (
            [torch.zeros(LAYOUT.token_bytes + 1, dtype=torch.uint8)],
            r"chunks\[0\]: got 385 bytes, .* steps of 384",
        ),
        ([torch.zeros(0, dtype=torch.uint8)], r"chunks\[0\]: got 0 bytes"),
        (
            [torch.zeros(384, dtype=torch.uint8), torch.zeros(6144, dtype=torch.uint8)],
            r"chunks\[0\]: got 384 bytes, wanted 6144 bytes$",
        ),
        ([torch.zeros(6144, dtype=torch.uint8, device="meta")], r"chunks\[0\].device: got meta, wanted cpu"),
        ([torch.zeros(6145, dtype=torch.uint8)[1:]], r"chunks\[0\]: got address .* aligned"),
    ],
)
def test_wrong_chunks_are_named(chunks: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        gather_tokens(paged_kv("kpshd", LAYOUT), SLOTS, chunks)


def test_forms_are_not_mixed() -> None:
    paged = paged_kv("kpshd", LAYOUT)
    with pytest.raises(ArgumentError, match=r"paged.layout.form: got 'tokens', wanted 'pages'"):
        gather_pages(paged, SLOTS[:4], chunks_for(paged, CHUNK_TOKENS))
    pages = PagedKV.from_tensors(tensors("pkshd", LAYOUT), "pkshd", page_layout())
    with pytest.raises(ArgumentError, match=r"paged.layout.form: got 'pages', wanted 'tokens'"):
        gather_tokens(pages, SLOTS, chunks_for(pages, CHUNK_TOKENS))
    with pytest.raises(ArgumentError, match="pages: got 24, wanted -1"):
        gather_pages(pages, torch.tensor([0, 1, 2, PAGES]), chunks_for(pages, CHUNK_TOKENS))


def test_spread_runs_every_task_once_and_raises_when_none_runs_any_more() -> None:
    done: list[int] = []
    spread(done.append, 50, 4)
    assert sorted(done) == list(range(50))
    meet, ended = threading.Barrier(3), []

    def task(number: int) -> None:
        meet.wait(timeout=10)
        if number == 1:
            raise KeyError(number)
        ended.append(number)

    with pytest.raises(KeyError):
        spread(task, 3, 3)
    assert sorted(ended) == [0, 2]
    spread(done.append, 0, 4)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_spread_works_after_a_fork() -> None:
    spread(lambda number: None, 8, 3)
    child = os.fork()
    if child == 0:
        done: list[int] = []
        spread(done.append, 20, 3)
        os._exit(0 if sorted(done) == list(range(20)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
