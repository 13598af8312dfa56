"""What LMCache calls a GPU connector: ours for paged KV in host memory (per layer [K/V, slot, hidden]), and
its own for KV on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface, VLLMPagedMemLayerwiseGPUConnector

from tests.lmcache.paged import Shape


def connector_of(config: Any, metadata: Any, shape: Shape) -> GPUConnectorInterface:
    """The one for KV of this shape; on a GPU the one that LMCache has for vLLM."""
    if shape.device != "cpu":
        from lmcache.utils import EngineType
        from lmcache.v1.gpu_connector import CreateGPUConnector

        return CreateGPUConnector(config, metadata, EngineType.VLLM, layout_hints={"kv_layout": "NHD"})
    sizes = shape.parts, shape.layers, shape.hidden
    return CpuLayerwiseConnector(sizes) if config.use_layerwise else CpuConnector(sizes)


class CpuConnector(GPUConnectorInterface):
    """All layers of a chunk at once: [K/V, layer, token, hidden], groups of layers one tensor each."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.parts, self.layers, self.hidden = shape

    def get_shape(self, num_tokens: int) -> torch.Size:
        return torch.Size([self.parts, self.layers, num_tokens, self.hidden])

    def from_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        slots = kwargs["slot_mapping"][start:end]
        for layer, tensor in enumerate(_layers(memory_obj)):
            tensor.copy_(kwargs["kvcaches"][layer][:, slots])

    def to_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        slots = kwargs["slot_mapping"][start:end]
        for layer, tensor in enumerate(_layers(memory_obj)):
            kwargs["kvcaches"][layer][:, slots] = tensor

    def batched_from_gpu(self, memory_objs: Any, starts: Any, ends: Any, **kwargs: Any) -> None:
        for memory, start, end in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(memory, start, end, **kwargs)

    def batched_to_gpu(
        self, memory_objs: Any = None, starts: Any = None, ends: Any = None, **kwargs: Any
    ) -> None:
        for memory, start, end in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(memory, start, end, **kwargs)


class CpuLayerwiseConnector(VLLMPagedMemLayerwiseGPUConnector):
    """Layer by layer, [token, K/V, hidden]; LMCache takes it for the real one, by its base class."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.parts, self.num_layers, self.hidden = shape

    def get_shape(self, num_tokens: int) -> torch.Size:
        return torch.Size([num_tokens, self.parts, self.hidden])

    def batched_from_gpu(self, memory_objs: Any, starts: Any, ends: Any, **kwargs: Any) -> Iterator[None]:
        for layer in range(self.num_layers):
            for memory, start, end in zip(memory_objs[layer], starts, ends, strict=True):
                slots = kwargs["slot_mapping"][start:end]
                memory.tensor.copy_(kwargs["kvcaches"][layer][:, slots].transpose(0, 1))
            yield
        yield

    def batched_to_gpu(self, starts: Any, ends: Any, **kwargs: Any) -> Iterator[None]:
        for layer in range(self.num_layers):
            memory_objs = yield
            for memory, start, end in zip(memory_objs, starts, ends, strict=True):
                slots = kwargs["slot_mapping"][start:end]
                kwargs["kvcaches"][layer][:, slots] = memory.tensor.transpose(0, 1)
        yield
        yield


def _layers(memory: Any) -> Iterator[torch.Tensor]:
    """Of each layer its tensor [K/V, token, hidden], group after group."""
    for group in range(len(memory.get_shapes())):
        yield from memory.get_tensor(group).unbind(1)
