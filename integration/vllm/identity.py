"""Whose KV it is: everything that decides a chunk's bytes and that vLLM's block hashes leave out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from vcache.errors import ArgumentError
from vcache.keys import join_fields, model_digest

_UNTOLD = ("_name_or_path", "transformers_version", "_attn_implementation_autoset")
"""Of a model's configuration: where it lies and who read it, which does not count."""


def model_identity(vllm_config: Any) -> tuple[str, str]:
    """(a name for people that the pool groups chunks by, a digest of all that decides the KV of a token)."""
    model = vllm_config.model_config
    told = [
        *_model_fields(model),
        *_speculator(vllm_config),
        _weights(vllm_config, model),
        str(vllm_config.cache_config.cache_dtype),
        str(getattr(vllm_config.cache_config, "calculate_kv_scales", False)),
    ]
    parallel = vllm_config.parallel_config
    told += [str(parallel.tensor_parallel_size), str(parallel.pipeline_parallel_size)]
    digest = _digest(told)
    return f"{Path(model.model).name} {digest[:12]}", digest


def group_identity(model: str, group: Any, layer_names: list[str], page_format: str) -> str:
    """The identity of one group's chunks on a rank: its layers, how they attend, what is inside a page."""
    return _digest([model, str(group.index), repr(group.spec), *layer_names, page_format])


def page_format(backend: str, isa: str, version: str, tensor: torch.Tensor) -> str:
    """What a page's inside depends on, in words."""
    inner = "x".join(map(str, tensor.shape[1:]))
    strides = ",".join(map(str, tensor.stride()[1:]))
    release = ".".join(version.split(".")[:2])
    words = [
        f"vllm-{release}",
        backend,
        isa or "-",
        f"{inner}/{strides}",
        str(tensor.dtype).removeprefix("torch."),
    ]
    return " ".join(words)


def lora_files(path: str) -> Path:
    """Where vLLM finds an adapter's files: a path, or the hub's name of one that this machine has. Raises
    ArgumentError if they are not there, for then nobody knows what the name means.
    """
    files = Path(path).expanduser()
    if not files.exists():
        files = Path(_snapshot(path, ""))
    if not files.exists():
        raise ArgumentError("lora_path", path, "an adapter whose files are on this machine")
    return files


def lora_stamp(files: Path) -> str:
    """Another one when the files have been written to. Raises OSError."""
    told = sorted(files.iterdir()) if files.is_dir() else [files]
    stats = [(each.name, each.stat()) for each in told if each.is_file()]
    return repr([files, *((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)])


def lora_identity(files: Path) -> str:
    """An adapter by its content, every byte of it: adapters are small, and two of one training may differ in
    few of them. Raises ArgumentError, OSError.
    """
    return model_digest(files, is_sampled=False)


def _files_of(name: str, revision: str) -> str:
    path = Path(name)
    try:
        return model_digest(path if path.exists() else _snapshot(name, revision), revision)
    except (ArgumentError, OSError):  # a directory without files that we know: then its name has to do
        return model_digest(f"{name}@{revision}")


def _snapshot(name: str, revision: str) -> str:
    """Where the hub's files of a model lie on this machine, since a name such as `main` means other files
    later.
    """
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(name, revision=revision or None, local_files_only=True))
    except Exception:  # whatever a hub's library raises: then the name has to do
        return name


def _model_fields(model: Any) -> list[str]:
    """A model's files, and what is made of them."""
    told = {name: value for name, value in model.hf_config.to_dict().items() if name not in _UNTOLD}
    return [
        _files_of(model.model, model.revision or ""),
        str(model.dtype),
        str(model.quantization),
        _canonical(getattr(model, "quantization_config", None)),
        _canonical(told),
    ]


def _speculator(vllm_config: Any) -> list[str]:
    """A draft model's layers lie in the same pages."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return []
    draft = getattr(speculative, "draft_model_config", None)
    return [str(getattr(speculative, "method", "")), *([] if draft is None else _model_fields(draft))]


def _weights(vllm_config: Any, model: Any) -> str:
    """How weights are loaded: a loader may be told to read others than the files have, and those that are not
    read at all are what the seed makes them.
    """
    load = vllm_config.load_config
    loading = str(getattr(load.load_format, "value", load.load_format))
    told = _canonical(load.model_loader_extra_config)
    return f"dummy {model.seed} {told}" if loading == "dummy" else told


def _canonical(value: Any) -> str:
    """The same words for the same configuration in every process. Objects of classes that we do not know are
    told apart by what they say of themselves.
    """
    return json.dumps(value, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    """A value that JSON does not know, in terms of others."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Set):
        return sorted(map(_canonical, value))
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def _digest(fields: list[str]) -> str:
    return blake2b(join_fields(field.encode() for field in fields), digest_size=16).hexdigest()
