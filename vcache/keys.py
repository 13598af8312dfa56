"""Chunk keys: prefix-chained digests that are equal in every process, on every machine.

    key[-1] = H(version, layout fingerprint, model, rank, cache salt, LoRA)
    key[i]  = H(key[i-1] ‖ tokens of chunk i as little-endian int64)

H is BLAKE2b. Two sequences share key[i] exactly if they share all tokens up to the end of chunk i and
everything in the root. Python's own `hash` is never used: it differs between processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from vcache.errors import ArgumentError
from vcache.limits import (
    FINGERPRINT_BYTES,
    KEY_BYTES,
    MODEL_PIECE_BYTES,
    MODEL_SAMPLE_BYTES,
    MODEL_SAMPLES,
    NAMESPACE_BYTES,
)

_ROOT_VERSION: Final = b"vcache.key.1"
_MODEL_VERSION: Final = b"vcache.model.1"
_WHOLE_SUFFIXES: Final = frozenset({".json", ".py"})
_WEIGHT_SUFFIXES: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz"})

Tokens: TypeAlias = Any
"""A sequence of int, or a 1-D integer array or tensor: torch, whose type this would name, is not imported."""


def join_fields(fields: Iterable[bytes]) -> bytes:
    """Join fields so that no two different lists of fields give the same bytes: each one after its length."""
    return b"".join(len(field).to_bytes(8, "little") + field for field in fields)


def as_tokens(tokens: Tokens, field: str = "tokens") -> npt.NDArray[np.int64]:
    """Tokens as a contiguous little-endian int64 array, whatever they came in.

    `tokens` is a sequence of int, a 1-D integer numpy array or a 1-D integer torch tensor on any device.
    Raises ArgumentError, naming `field`, for anything else.
    """
    if isinstance(tokens, (str, bytes)):
        raise ArgumentError(field, type(tokens).__name__, "token ids (1-D integers)")
    if callable(getattr(tokens, "numpy", None)):  # a torch tensor, recognised without importing torch
        tokens = tensor_as_array(tokens, field, "token ids (1-D integers)")
    if not isinstance(tokens, np.ndarray):
        try:
            tokens = np.asarray(tokens) if len(tokens) else np.empty(0, np.int64)
        except (TypeError, ValueError, OverflowError) as error:
            raise ArgumentError(field, type(tokens).__name__, f"token ids (1-D integers): {error}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ArgumentError(field, f"{tokens.dtype} of shape {tokens.shape}", "token ids (1-D integers)")
    if tokens.dtype == np.uint64 and tokens.size and int(tokens.max()) > np.iinfo(np.int64).max:
        raise ArgumentError(field, int(tokens.max()), "token ids that fit 64 signed bits")
    return np.ascontiguousarray(tokens, dtype="<i8")


def tensor_as_array(tensor: Any, field: str, wanted: str) -> npt.NDArray[Any]:
    """A torch tensor as a numpy array. Raises ArgumentError for what numpy does not have (sparse, bfloat16,
    meta, …).
    """
    try:
        array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    except (TypeError, RuntimeError, AttributeError) as error:  # NotImplementedError is a RuntimeError
        raise ArgumentError(field, type(tensor).__name__, f"{wanted}: {error}") from error
    return array


class KeyChain:
    """The chunk keys of one namespace: one model, layout, rank, tenant and adapter.

    `model` and `lora` are identities, best those that `model_digest` gives for their files; a name is as good
    as the promise that it always means the same weights. A `cache_salt` isolates tenants from each other.
    Raises ArgumentError for a fingerprint of a wrong length or a rank that is no unsigned 32-bit integer.
    """

    __slots__ = ("root",)

    def __init__(
        self,
        layout_fingerprint: bytes,
        model: str,
        rank: int = 0,
        cache_salt: str | bytes = "",
        lora: str = "",
    ) -> None:
        if len(layout_fingerprint) != FINGERPRINT_BYTES:
            wanted = f"{FINGERPRINT_BYTES} bytes"
            raise ArgumentError("layout_fingerprint", f"{len(layout_fingerprint)} bytes", wanted)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < 1 << 32:
            raise ArgumentError("rank", rank, "an integer from 0 to 2**32 - 1")
        fields = [
            _ROOT_VERSION,
            layout_fingerprint,
            _encoded(model, "model"),
            rank.to_bytes(4, "little"),
            cache_salt if isinstance(cache_salt, bytes) else _encoded(cache_salt, "cache_salt"),
            _encoded(lora, "lora"),
        ]
        self.root = blake2b(join_fields(fields), digest_size=KEY_BYTES).digest()

    def extend(self, parent: bytes, tokens: Tokens) -> bytes:
        """The key of the chunk that holds `tokens` and follows the one with key `parent` (first: `root`)."""
        if len(parent) != KEY_BYTES:
            raise ArgumentError("parent", f"{len(parent)} bytes", f"a key of {KEY_BYTES} bytes")
        return blake2b(parent + as_tokens(tokens).tobytes(), digest_size=KEY_BYTES).digest()

    def bind(self, key: bytes) -> bytes:
        """The chunk key that stands for an engine's own `key` in this namespace.

        An engine's block hash says which tokens, not which model, layout, rank or tenant.
        """
        return blake2b(self.root + key, digest_size=KEY_BYTES, person=b"vcache.bound").digest()

    def keys(self, tokens: Tokens, chunk_tokens: int, *, partial: bool = False) -> list[bytes]:
        """The keys of all whole chunks of `tokens`, in order; with `partial`, of an incomplete last one."""
        if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
            raise ArgumentError("chunk_tokens", chunk_tokens, "a positive integer")
        array = as_tokens(tokens)
        whole = len(array) // chunk_tokens * chunk_tokens
        encoded = memoryview(array.tobytes())
        step = chunk_tokens * array.itemsize
        key, keys = self.root, []
        for begin in range(0, len(encoded) if partial else whole * array.itemsize, step):
            digest = blake2b(key, digest_size=KEY_BYTES)
            digest.update(encoded[begin : begin + step])
            key = digest.digest()
            keys.append(key)
        return keys


def _encoded(text: str, field: str) -> bytes:
    try:
        return text.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise ArgumentError(field, repr(text), "a str that UTF-8 can encode") from error


def namespace(model: str) -> bytes:
    """The 8 bytes under which the directory groups a model's chunks, for `clear` and `list`; no identity."""
    return blake2b(model.encode(), digest_size=NAMESPACE_BYTES, person=b"vcache.space").digest()


def model_digest(path_or_name: str | os.PathLike[str], revision: str = "", *, is_sampled: bool = True) -> str:
    """The identity of a model, or of a LoRA adapter, as 32 hexadecimal digits.

    For a directory (or one weights file): names, sizes and contents of the configuration, index and code
    files, names and sizes of the weights, and samples of their bytes, since two checkpoints of one training
    run differ in nothing else. Where it lies does not count. Samples can miss a change of a few tensors: give
    such a model its own `revision`, or have all bytes read (is_sampled=False).
    For a name that is no path: a digest of name and revision. Raises ArgumentError for a directory without a
    model.
    """
    path = Path(path_or_name)
    if path.is_dir():
        files = (entry for entry in path.iterdir() if entry.is_file())
        names = sorted(file.name for file in files if file.suffix in _WHOLE_SUFFIXES | _WEIGHT_SUFFIXES)
        if not names:
            raise ArgumentError("model", path, "a directory with a configuration or weights")
        fields = [b"directory", *(field for name in names for field in _file_fields(path / name, is_sampled))]
    elif path.is_file():
        fields = [b"file", *_file_fields(path, is_sampled)]
    else:
        fields = [b"name", str(path_or_name).encode()]
    return blake2b(join_fields([_MODEL_VERSION, revision.encode(), *fields]), digest_size=16).hexdigest()


def _file_fields(path: Path, is_sampled: bool) -> list[bytes]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        whole = path.suffix in _WHOLE_SUFFIXES or not is_sampled
        digest = blake2b(digest_size=32)
        for piece in _pieces(file) if whole else _samples(file, size):
            digest.update(piece)
    return [path.name.encode(), size.to_bytes(8, "little"), digest.digest()]


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """All of a file."""
    while piece := file.read(MODEL_PIECE_BYTES):
        yield piece


def _samples(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Evenly spaced pieces of a file, its first and last bytes among them; a small file as it is."""
    if size <= MODEL_SAMPLES * MODEL_SAMPLE_BYTES:
        yield from _pieces(file)
        return
    for index in range(MODEL_SAMPLES):
        file.seek((size - MODEL_SAMPLE_BYTES) * index // (MODEL_SAMPLES - 1))
        yield file.read(MODEL_SAMPLE_BYTES)
