"""What a chunk of one LMCache engine is, as its configuration and metadata say."""

from __future__ import annotations

from typing import Any, NamedTuple

from lmcache.v1.memory_management import MemoryFormat

from vcache.engine.forms import Form
from vcache.layout import DTYPE_BYTES, KVLayout


class EngineChunk(NamedTuple):
    """A whole chunk.

    layers: of how many parts it is stored, each one by itself; 0: it is stored at once. nbytes: what a lower
    tier is asked for. usual_format: where LMCache names none.
    """

    layout: KVLayout
    tokens: int
    layers: int
    nbytes: int
    usual_format: MemoryFormat


def chunk_of(config: Any, metadata: Any) -> EngineChunk:
    """That of an engine with this configuration and metadata."""
    layers, parts, _, heads, size = (int(number) for number in metadata.kv_shape)
    dtype = str(metadata.kv_dtype).removeprefix("torch.")
    tokens = int(config.chunk_size)
    if config.use_layerwise:
        form = Form(((tokens, parts, heads * size),), (dtype,), 0, layers)
    else:
        form = Form(((parts, layers, tokens, heads * size),), (dtype,), 0)
    return EngineChunk(
        layout=_layout(config, metadata),
        tokens=tokens,
        layers=layers if config.use_layerwise else 0,
        nbytes=form.chunk_bytes,
        usual_format=_usual_format(config, metadata),
    )


def _layout(config: Any, metadata: Any) -> KVLayout:
    """As far as it is known at once and the same in all processes."""
    layers, parts, _, heads, size = (int(number) for number in metadata.kv_shape)
    dtype = str(metadata.kv_dtype).removeprefix("torch.")
    return KVLayout(
        num_layers=layers,
        num_kv_heads=heads,
        head_size=size,
        dtype=dtype if dtype in DTYPE_BYTES else "uint8",
        chunk_tokens=int(config.chunk_size),
        kv_parts=parts,
        form="pages",
        page_tokens=int(config.chunk_size),
        page_bytes=int(config.chunk_size) * parts * heads * size * metadata.kv_dtype.itemsize,
        page_format=f"lmcache.1 {dtype}" + (" mla" if metadata.use_mla else ""),
    )


def _usual_format(config: Any, metadata: Any) -> MemoryFormat:
    if metadata.use_mla:
        return MemoryFormat.KV_MLA_FMT
    if not config.use_layerwise:
        return MemoryFormat.KV_2LTD
    return MemoryFormat.KV_2TD if config.enable_blending else MemoryFormat.KV_T2D
