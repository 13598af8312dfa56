"""vcache.keys: golden vectors, chaining, token types, identities of models."""

from __future__ import annotations

import struct
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.errors import ArgumentError
from vcache.keys import KeyChain, as_tokens, join_fields, model_digest, namespace
from vcache.limits import KEY_BYTES, MODEL_SAMPLE_BYTES, MODEL_SAMPLES, NAMESPACE_BYTES

FINGERPRINT = bytes(range(16))
CHAIN = KeyChain(FINGERPRINT, "some/model", rank=1, cache_salt="tenant", lora="adapter")
TOKENS = list(range(1000, 1010))

token_lists = st.lists(st.integers(0, 1 << 31), max_size=40)


def test_keys_do_not_change() -> None:
    """Keys are on disks and in other processes: changing them wants a new version in the root."""
    assert CHAIN.root.hex() == "fa7f893502d635f85465ed691bf925c33cfbc5b6918f5dff63dc48f29f56f2e5"
    assert [key.hex() for key in CHAIN.keys(TOKENS, 4, partial=True)] == [
        "10ed4a72fd627981b4ed2b81b6392ffc710c964cc18f51095a229f3b63f2e9ef",
        "bea662adb0cee64069ec9ffbc2a03c5ba8e0d37f3944d5b7814e4746307b6253",
        "1a2cedcb402b893475610f5bcda6f5e166f582acfa94c096d17201db0e2002ba",
    ]
    assert namespace("some/model").hex() == "367c77020f402d5b"
    assert model_digest("some/model", "main") == "66cfc23aca84699c60256223accfc0b2"


def test_keys_chain_by_extend() -> None:
    parent = CHAIN.root
    for index, key in enumerate(CHAIN.keys(TOKENS, 4, partial=True)):
        parent = CHAIN.extend(parent, TOKENS[index * 4 : index * 4 + 4])
        assert key == parent
        assert len(key) == KEY_BYTES


def test_a_key_is_the_digest_of_its_parent_and_its_tokens() -> None:
    digest = blake2b(CHAIN.root + struct.pack("<4q", *TOKENS[:4]), digest_size=32).digest()
    assert CHAIN.keys(TOKENS, 4)[0] == digest


def test_an_incomplete_chunk_has_a_key_only_when_asked() -> None:
    assert len(CHAIN.keys(TOKENS, 4)) == 2
    assert len(CHAIN.keys(TOKENS, 4, partial=True)) == 3
    assert len(CHAIN.keys(TOKENS, 5, partial=True)) == 2
    assert CHAIN.keys([], 4, partial=True) == []


@given(token_lists, token_lists, token_lists, st.integers(1, 9))
@settings(max_examples=60)
def test_keys_are_equal_exactly_as_far_as_prefixes_are(
    prefix: list[int], left: list[int], right: list[int], chunk: int
) -> None:
    a, b = prefix + left, prefix + right
    same = 0
    while (same + 1) * chunk <= min(len(a), len(b)) and a[: (same + 1) * chunk] == b[: (same + 1) * chunk]:
        same += 1
    keys_a, keys_b = CHAIN.keys(a, chunk), CHAIN.keys(b, chunk)
    assert keys_a[:same] == keys_b[:same]
    assert not set(keys_a[same:]) & set(keys_b[same:])


@pytest.mark.parametrize(
    "other",
    [
        KeyChain(bytes(16), "some/model", 1, "tenant", "adapter"),
        KeyChain(FINGERPRINT, "some/model2", 1, "tenant", "adapter"),
        KeyChain(FINGERPRINT, "some/model", 0, "tenant", "adapter"),
        KeyChain(FINGERPRINT, "some/model", 1, "", "adapter"),
        KeyChain(FINGERPRINT, "some/model", 1, "tenant", ""),
        KeyChain(FINGERPRINT, "some/model", 1, "tenantadapter", ""),
        KeyChain(FINGERPRINT, "some/model", 1, "", "tenantadapter"),
    ],
)
def test_everything_in_the_root_counts(other: KeyChain) -> None:
    assert other.root != CHAIN.root


def test_a_salt_may_be_bytes() -> None:
    assert KeyChain(FINGERPRINT, "m", cache_salt=b"x").root == KeyChain(FINGERPRINT, "m", cache_salt="x").root


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
@settings(max_examples=100)
def test_joined_fields_are_unambiguous(left: list[bytes], right: list[bytes]) -> None:
    assert (join_fields(left) == join_fields(right)) == (left == right)


@pytest.mark.parametrize(
    "tokens",
    [
        tuple(TOKENS),
        range(1000, 1010),
        np.array(TOKENS, np.int32),
        np.array(TOKENS, np.uint64),
        np.array(TOKENS, ">i8"),
        np.repeat(np.array(TOKENS), 2)[::2],
        torch.tensor(TOKENS),
        torch.tensor(TOKENS, dtype=torch.int32),
        torch.tensor(TOKENS).repeat_interleave(2)[::2],
    ],
)
def test_the_type_of_tokens_does_not_matter(tokens: Any) -> None:
    assert CHAIN.keys(tokens, 4, partial=True) == CHAIN.keys(TOKENS, 4, partial=True)


@pytest.mark.parametrize(
    "tokens",
    [
        "abc",
        b"abc",
        7,
        None,
        [1.5, 2.0],
        ["a"],
        [True, False],
        [[1, 2], [3, 4]],
        [[1, 2], [3]],
        [1 << 70],
        np.zeros((2, 2), np.int64),
        np.zeros(2),
        np.array([1 << 63], np.uint64),
        torch.zeros(3),
        torch.zeros(2, 2, dtype=torch.int64),
    ],
)
def test_what_are_no_tokens_is_an_error(tokens: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^tokens: got "):
        CHAIN.keys(tokens, 4)
    with pytest.raises(ArgumentError, match=r"^prompt: got "):
        as_tokens(tokens, "prompt")


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="layout_fingerprint: got 3 bytes, wanted 16 bytes"):
        KeyChain(b"abc", "m")
    with pytest.raises(ArgumentError, match="rank: got -1"):
        KeyChain(FINGERPRINT, "m", rank=-1)
    with pytest.raises(ArgumentError, match="chunk_tokens: got 0"):
        CHAIN.keys(TOKENS, 0)
    with pytest.raises(ArgumentError, match="parent: got 3 bytes"):
        CHAIN.extend(b"abc", TOKENS)


def model_at(path: Path, *, config: str = "{}", weights: bytes = b"\0" * 10) -> Path:
    path.mkdir()
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_a_model_is_its_files_wherever_they_lie(tmp_path: Path) -> None:
    first, second = model_at(tmp_path / "a"), model_at(tmp_path / "b")
    (second / "README.md").write_text("other words")
    assert model_digest(first) == model_digest(str(second))
    assert model_digest(first) != model_digest(first, "main")
    assert len(model_digest(first)) == 32


def test_another_configuration_or_size_is_another_model(tmp_path: Path) -> None:
    digests = {
        model_digest(model_at(tmp_path / "a")),
        model_digest(model_at(tmp_path / "b", config="{ }")),
        model_digest(model_at(tmp_path / "c", weights=b"\0" * 11)),
        model_digest(model_at(tmp_path / "d", weights=b"\0" * 9 + b"\1")),
        model_digest(str(tmp_path / "nowhere")),
        model_digest(tmp_path / "a" / "model.safetensors"),
    }
    assert len(digests) == 6


def test_large_weights_are_sampled_to_the_last_byte(tmp_path: Path) -> None:
    size = MODEL_SAMPLES * MODEL_SAMPLE_BYTES + 12345
    plain = model_at(tmp_path / "a", weights=b"\0" * size)
    last = model_at(tmp_path / "b", weights=b"\0" * (size - 1) + b"\1")
    assert model_digest(plain) != model_digest(last)


def test_one_byte_between_samples_counts_when_all_are_read(tmp_path: Path) -> None:
    weights = bytearray(MODEL_SAMPLES * MODEL_SAMPLE_BYTES * 2)
    plain = model_at(tmp_path / "a", weights=bytes(weights))
    weights[MODEL_SAMPLE_BYTES + 1] = 1
    other = model_at(tmp_path / "b", weights=bytes(weights))
    assert model_digest(plain) == model_digest(other)
    assert model_digest(plain, is_sampled=False) != model_digest(other, is_sampled=False)


def test_a_directory_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"model: got .*a directory with a configuration or weights"):
        model_digest(tmp_path)


def test_namespaces() -> None:
    assert len(namespace("m")) == NAMESPACE_BYTES
    assert namespace("m") != namespace("n")
