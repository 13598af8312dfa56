"""What tensors a chunk holds, told by the chunk itself: its last FORM_BYTES say it to any process.

[part 0][part 1]…[form]     parts are of one size and begin at multiples of PART_ALIGN_BYTES
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, Final

import msgspec
import torch
from msgspec import Meta

from vcache.errors import ArgumentError, RemoteProtocolError
from vcache.limits import CHUNK_BYTES_MAX, FORM_BYTES, PART_ALIGN_BYTES, PARTS_MAX

_MAGIC: Final = b"vcache.form.1\0\0\0"
_HEAD: Final = len(_MAGIC) + 4

Dimension = Annotated[int, Meta(ge=0, le=CHUNK_BYTES_MAX)]


class Form(msgspec.Struct, frozen=True, array_like=True):
    """The tensors of a chunk: `parts` times the same group of tensors, one behind the other.

    shapes, dtypes: of each tensor in one part, by torch's names ("bfloat16"). kind: a number that means
    something to whoever stored the chunk (LMCache: its memory format).
    """

    shapes: tuple[tuple[Dimension, ...], ...]
    dtypes: tuple[str, ...]
    kind: int
    parts: Annotated[int, Meta(ge=1, le=PARTS_MAX)] = 1

    @property
    def part_bytes(self) -> int:
        """Bytes of one part's tensors."""
        return _part_bytes(self)

    @property
    def stride(self) -> int:
        """From one part's beginning to the next one's."""
        return -(-self.part_bytes // PART_ALIGN_BYTES) * PART_ALIGN_BYTES

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the whole chunk, the form at its end included."""
        return self.stride * self.parts + FORM_BYTES

    def part(self, chunk: torch.Tensor, index: int) -> torch.Tensor:
        """The bytes of one part in the chunk's (uint8, 1-D)."""
        return chunk[index * self.stride : index * self.stride + self.part_bytes]

    def encode(self) -> bytes:
        """FORM_BYTES for the chunk's end. Raises ArgumentError for a form that cannot be."""
        return _encode(self)


def decode(end: bytes, chunk_bytes: int) -> Form:
    """The form in the end of a chunk of `chunk_bytes`; RemoteProtocolError if that makes no sense."""
    form = _decode(end)
    if form.chunk_bytes != chunk_bytes:
        raise RemoteProtocolError(f"form: of a chunk of {form.chunk_bytes} bytes, but it has {chunk_bytes}")
    return form


def dtype_of(name: str) -> torch.dtype:
    """torch's element type of that name. Raises RemoteProtocolError if there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise RemoteProtocolError(f"form: an element type {name[:40]!r}")
    return dtype


@lru_cache(maxsize=1024)
def _part_bytes(form: Form) -> int:
    return sum(
        math.prod(shape) * dtype_of(name).itemsize
        for shape, name in zip(form.shapes, form.dtypes, strict=True)
    )


@lru_cache(maxsize=1024)
def _encode(form: Form) -> bytes:
    if len(form.shapes) != len(form.dtypes) or not form.part_bytes or not 1 <= form.parts <= PARTS_MAX:
        raise ArgumentError("form", form, "a type for each shape, some bytes, and at least one part")
    body = msgspec.msgpack.encode(form)
    if len(body) > FORM_BYTES - _HEAD or form.chunk_bytes > CHUNK_BYTES_MAX:
        raise ArgumentError("form", f"{len(form.shapes)} tensors, {form.chunk_bytes} bytes", "fewer")
    return (_MAGIC + len(body).to_bytes(4, "little") + body).ljust(FORM_BYTES, b"\0")


@lru_cache(maxsize=1024)
def _decode(end: bytes) -> Form:
    size = int.from_bytes(end[len(_MAGIC) : _HEAD], "little")
    if len(end) != FORM_BYTES or not end.startswith(_MAGIC) or size > FORM_BYTES - _HEAD:
        raise RemoteProtocolError("form: a chunk that does not say what it holds")
    try:
        form = msgspec.msgpack.decode(end[_HEAD : _HEAD + size], type=Form)
    except msgspec.MsgspecError as error:
        raise RemoteProtocolError(f"form: {error}") from error
    if len(form.shapes) != len(form.dtypes) or not form.part_bytes:
        raise RemoteProtocolError("form: shapes and types differ in number, or there is nothing")
    return form
