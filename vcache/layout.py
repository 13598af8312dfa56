"""What a chunk's bytes mean: `KVLayout`, its sizes and its fingerprint.

Two forms. `tokens`: `[layer, K/V, token, head, head_size]` contiguous (MLA: `[layer, token, latent]`),
readable whatever the reader's page size. `pages`: `[layer, page, the page's bytes verbatim]`, for pages whose
inside only the engine's attention backend knows. Both are layer-major, so that layer 0 can be scattered while
layer 1 is on its way.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import Final, Literal

import msgspec

from vcache.errors import ArgumentError
from vcache.keys import join_fields
from vcache.limits import CHUNK_BYTES_MAX, FINGERPRINT_BYTES, KIB, MIB

_FINGERPRINT_VERSION: Final = b"vcache.layout.1"

DTYPE_BYTES: Final = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "uint8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
"""Element types of a KV cache, by torch's names; `uint8` is how engines hold fp8 and quantised KV."""


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk's bytes mean; equal layouts, and only they, have equal fingerprints.

    kv_parts: 2 for K and V, 1 for MLA's latent (then `num_kv_heads` is 1 and `head_size` the latent's width).
    chunk_tokens: tokens in a whole chunk; in the pages form a multiple of page_tokens.
    page_tokens, page_bytes: pages form only: tokens in a page; all bytes that a page of one layer holds.
    page_format: pages form only: free text naming what a page's inside depends on (backend, ISA). A word
        `axes=…` in it is compared with `PagedKV.page_axes`, so that pages of another order are refused. Where
        one tensor holds all layers and a page of all of them is contiguous, say `num_layers=1`, count all
        layers in `page_bytes`, and name them here: then a page is one copy.

    Raises ArgumentError, naming the field, for values that make no layout.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: str
    chunk_tokens: int
    kv_parts: int = 2
    form: Literal["tokens", "pages"] = "tokens"
    page_tokens: int = 0
    page_bytes: int = 0
    page_format: str = ""

    def __post_init__(self) -> None:
        for field in ("num_layers", "num_kv_heads", "head_size", "chunk_tokens", "kv_parts"):
            _check_positive(field, getattr(self, field))
        if self.kv_parts > 2:
            raise ArgumentError("layout.kv_parts", self.kv_parts, "2 (K and V) or 1 (MLA latent)")
        if self.dtype not in DTYPE_BYTES:
            raise ArgumentError("layout.dtype", repr(self.dtype), f"one of {', '.join(DTYPE_BYTES)}")
        if self.form == "pages":
            self._check_pages()
        elif self.form != "tokens":
            raise ArgumentError("layout.form", repr(self.form), "'tokens' or 'pages'")
        elif self.page_tokens or self.page_bytes or self.page_format:
            wanted = "'pages' where page_tokens, page_bytes or page_format is given"
            raise ArgumentError("layout.form", "'tokens'", wanted)
        if self.chunk_bytes > CHUNK_BYTES_MAX:
            wanted = f"so few that a chunk has at most {CHUNK_BYTES_MAX} bytes; it has {self.chunk_bytes}"
            raise ArgumentError("layout.chunk_tokens", self.chunk_tokens, wanted)

    def _check_pages(self) -> None:
        _check_positive("page_tokens", self.page_tokens)
        _check_positive("page_bytes", self.page_bytes)
        if self.chunk_tokens % self.page_tokens:
            wanted = f"a multiple of page_tokens ({self.page_tokens})"
            raise ArgumentError("layout.chunk_tokens", self.chunk_tokens, wanted)
        if not self.page_format:
            raise ArgumentError(
                "layout.page_format", "''", "words that name what is inside a page (backend, ISA, axes)"
            )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, all layers. In the pages form its share of a page, rounded down."""
        if self.form == "pages":
            return self.num_layers * self.page_bytes // self.page_tokens
        return self.num_layers * self.kv_parts * self.num_kv_heads * self.head_size * DTYPE_BYTES[self.dtype]

    @property
    def pages_per_chunk(self) -> int:
        """Pages in a whole chunk; 0 in the tokens form, which knows no pages."""
        return self.chunk_tokens // self.page_tokens if self.form == "pages" else 0

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a whole chunk."""
        return self.bytes_for(self.chunk_tokens)

    def bytes_for(self, tokens: int) -> int:
        """Bytes of a chunk that holds `tokens` tokens; in the pages form those of whole pages."""
        if self.form == "pages":
            return -(-tokens // self.page_tokens) * self.num_layers * self.page_bytes
        return tokens * self.token_bytes

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that stand for this layout in keys, reservations and files; the same in every process."""
        return _fingerprint(self)

    def describe(self) -> str:
        """This layout in one line, for people."""
        parts = "K and V" if self.kv_parts == 2 else "one latent"
        unit, name = (MIB, "MiB") if self.chunk_bytes >= MIB else (KIB, "KiB")
        heads = f"{self.num_kv_heads} heads of {self.head_size}"
        line = (
            f"{self.num_layers} layers, {parts}, {heads}, {self.dtype}; chunks of {self.chunk_tokens} tokens"
        )
        line += f", {self.chunk_bytes / unit:.4g} {name}"
        if self.form == "pages":
            line += f", as pages of {self.page_tokens} tokens and {self.page_bytes} B ({self.page_format})"
        return line


def _check_positive(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"layout.{field}", repr(value), "a positive integer")


@lru_cache(maxsize=64)
def _fingerprint(layout: KVLayout) -> bytes:
    """Field names are part of it, so that a field added later cannot be taken for another."""
    fields = [_FINGERPRINT_VERSION]
    for field in sorted(layout.__struct_fields__):
        fields += [field.encode(), str(getattr(layout, field)).encode()]
    return blake2b(join_fields(fields), digest_size=FINGERPRINT_BYTES).digest()
