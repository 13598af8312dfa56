"""vcache.layout: sizes, fingerprints, and errors that name the field."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import pytest

from vcache.errors import ArgumentError
from vcache.layout import KVLayout

LLAMA: dict[str, Any] = {
    "num_layers": 32,
    "num_kv_heads": 8,
    "head_size": 128,
    "dtype": "bfloat16",
    "chunk_tokens": 256,
}
PAGES = {
    **LLAMA,
    "form": "pages",
    "page_tokens": 16,
    "page_bytes": 65536,
    "page_format": "FLASH_ATTN axes=shkd",
}


def test_tokens_form_sizes() -> None:
    layout = KVLayout(**LLAMA)
    assert layout.token_bytes == 128 * 1024
    assert layout.chunk_bytes == 32 << 20
    assert layout.bytes_for(10) == 10 * layout.token_bytes
    assert layout.pages_per_chunk == 0
    assert layout.describe() == "32 layers, K and V, 8 heads of 128, bfloat16; chunks of 256 tokens, 32 MiB"


def test_latent_sizes() -> None:
    layout = KVLayout(
        num_layers=27, num_kv_heads=1, head_size=576, dtype="float8_e4m3fn", chunk_tokens=3, kv_parts=1
    )
    assert layout.token_bytes == 27 * 576
    assert layout.chunk_bytes == 3 * 27 * 576
    assert "one latent" in layout.describe()
    assert "KiB" in layout.describe()


def test_pages_form_sizes() -> None:
    layout = KVLayout(**PAGES)
    assert layout.pages_per_chunk == 16
    assert layout.chunk_bytes == 16 * 32 * 65536
    assert layout.token_bytes == 32 * 65536 // 16
    assert layout.bytes_for(17) == 2 * 32 * 65536
    assert "FLASH_ATTN" in layout.describe()


def test_fingerprints_do_not_change() -> None:
    """A change of these makes every stored chunk a miss: it wants a new version in the fingerprint."""
    assert KVLayout(**LLAMA).fingerprint.hex() == "c3de4bfbb2b5de940ea4aad73b12591a"
    assert KVLayout(**PAGES).fingerprint.hex() == "bc582927c3fbaeac10620c65fe9c0bd5"


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 31},
        {"num_kv_heads": 4},
        {"head_size": 64},
        {"dtype": "float16"},
        {"chunk_tokens": 128},
        {"kv_parts": 1},
        {"page_tokens": 32},
        {"page_bytes": 65537},
        {"page_format": "FLASH_ATTN axes=hskd"},
    ],
)
def test_every_field_is_in_the_fingerprint(change: dict[str, Any]) -> None:
    assert KVLayout(**{**PAGES, **change}).fingerprint != KVLayout(**PAGES).fingerprint
    assert KVLayout(**PAGES).fingerprint == KVLayout(**PAGES).fingerprint


def test_the_form_is_in_the_fingerprint() -> None:
    assert KVLayout(**PAGES).fingerprint != KVLayout(**LLAMA).fingerprint


@pytest.mark.parametrize(
    ("base", "change", "field"),
    [
        (LLAMA, {"num_layers": 0}, "num_layers"),
        (LLAMA, {"num_kv_heads": -1}, "num_kv_heads"),
        (LLAMA, {"head_size": 1.5}, "head_size"),
        (LLAMA, {"chunk_tokens": True}, "chunk_tokens"),
        (LLAMA, {"chunk_tokens": 1 << 20}, "chunk_tokens"),
        (LLAMA, {"kv_parts": 3}, "kv_parts"),
        (LLAMA, {"dtype": "float64"}, "dtype"),
        (LLAMA, {"form": "rows"}, "form"),
        (LLAMA, {"page_tokens": 16}, "form"),
        (PAGES, {"page_tokens": 0}, "page_tokens"),
        (PAGES, {"page_bytes": 0}, "page_bytes"),
        (PAGES, {"page_tokens": 48}, "chunk_tokens"),
        (PAGES, {"page_format": ""}, "page_format"),
    ],
)
def test_what_makes_no_layout_is_named(base: dict[str, Any], change: dict[str, Any], field: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^layout\.{field}: got .*, wanted "):
        KVLayout(**{**base, **change})


def test_a_layout_travels_as_msgpack() -> None:
    layout = KVLayout(**PAGES)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=KVLayout) == layout


def test_neither_layout_nor_keys_load_torch() -> None:
    code = "import sys, vcache.layout, vcache.keys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
