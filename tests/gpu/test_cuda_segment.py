"""Segments in GPU memory: exported by CUDA IPC, opened by another process. Run with pytest -m gpu."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import msgspec
import pytest
import torch

from tests.segment_peer import Peer
from vcache.errors import ArgumentError, RemoteProtocolError, SegmentError
from vcache.limits import MIB
from vcache.segment import (
    DATA_OFFSET,
    Segment,
    SegmentDescriptor,
    allocate,
    decode_descriptor,
    encode_descriptor,
)
from vcache.segment.gpu import gpu_uuid

pytestmark = pytest.mark.gpu

SIZE = 8 * MIB


@pytest.fixture
def segment() -> Iterator[Segment]:
    with allocate("cuda:0", SIZE) as made:
        yield made


def described(segment: Segment) -> SegmentDescriptor:
    return decode_descriptor(segment.descriptor()[0])


def test_its_uuid_is_the_one_that_nvidia_smi_prints() -> None:
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    assert gpu_uuid(0) in re.findall(r"GPU-[0-9a-f-]{36}", listed)


def test_the_holder_sees_its_memory(segment: Segment) -> None:
    assert segment.device == "cuda:0"
    encoded, fd = segment.descriptor()
    assert fd is None
    assert len(decode_descriptor(encoded).handle) == 64
    view = segment.view(DATA_OFFSET, SIZE - DATA_OFFSET)
    assert view.device == torch.device("cuda:0")
    assert view.dtype == torch.uint8
    view.fill_(3)
    assert segment.view(SIZE - 4, 4).cpu().tolist() == [3, 3, 3, 3]
    assert segment.view(DATA_OFFSET + 16, 1).data_ptr() == view.data_ptr() + 16


def test_bytes_go_both_ways_between_processes(segment: Segment) -> None:
    pattern = torch.arange(SIZE - DATA_OFFSET, dtype=torch.int64, device="cuda:0").to(torch.uint8)
    view = segment.view(DATA_OFFSET, SIZE - DATA_OFFSET)
    view.copy_(pattern)
    torch.cuda.synchronize()
    with Peer() as peer:
        assert peer.map(segment) == "cuda:0"
        assert peer.ask(f"read {DATA_OFFSET} 300") == bytes(pattern[:300].cpu().numpy()).hex()
        assert peer.ask(f"fill {DATA_OFFSET + 10} 5 99") == "done"
        pattern[10:15] = 99
        assert torch.equal(view, pattern)
        assert peer.ask("retire") == "True"
        assert peer.map(segment) == "cuda:0", "closed and opened again"


def test_another_gpu_of_the_process_maps_it() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with allocate("cuda:1", SIZE) as segment, Peer() as peer:
        segment.view(DATA_OFFSET, 4).fill_(7)
        torch.cuda.synchronize(1)
        assert peer.map(segment) == "cuda:1"
        assert peer.ask(f"read {DATA_OFFSET} 4") == "07070707"


def test_a_foreign_incarnation_is_refused(segment: Segment) -> None:
    forged = msgspec.structs.replace(described(segment), incarnation=7)
    with Peer() as peer:
        assert peer.map_encoded(encode_descriptor(forged), None).startswith(RemoteProtocolError.__name__)
        assert peer.map(segment) == "cuda:0"


def test_a_forged_handle_is_an_error_in_words(segment: Segment) -> None:
    with Peer() as peer:
        for handle in (b"x" * 64, b"short"):
            forged = msgspec.structs.replace(described(segment), handle=handle)
            assert peer.map_encoded(encode_descriptor(forged), None).startswith(SegmentError.__name__)


def test_the_end_of_an_incarnation_is_in_the_header() -> None:
    segment = allocate("cuda:0", SIZE)
    encoded = segment.descriptor()[0]
    with Peer() as peer:
        assert peer.map(segment) == "cuda:0"
        assert peer.ask("retire") == "True"
        assert segment.close()
        assert peer.map_encoded(encoded, None).split(":")[0] in (
            SegmentError.__name__,
            RemoteProtocolError.__name__,
        )


def test_the_current_device_and_a_graph_capture_are_left_alone() -> None:
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(1)
    before = torch.cuda.current_device()
    graph = torch.cuda.CUDAGraph()
    work = torch.zeros(1024, device=f"cuda:{before}")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        work.add_(1)
        with allocate("cuda:0", SIZE):
            pass
    graph.replay()
    torch.cuda.synchronize()
    assert work.sum().item() == 1024
    assert torch.cuda.current_device() == before
    torch.cuda.set_device(0)


def test_sizes_and_devices_that_do_not_fit() -> None:
    with pytest.raises(ArgumentError, match="2 MiB"):
        allocate("cuda:0", 1 * MIB)
    with pytest.raises(ArgumentError, match="it sees"):
        allocate("cuda:999", SIZE)
    with pytest.raises(ArgumentError, match="numa"):
        allocate("cuda:0", SIZE, numa=0)
    with pytest.raises(SegmentError, match=r"the GPU has \d+ of \d+ MiB free"):
        allocate("cuda:0", 1 << 45)


def test_nothing_leaks() -> None:
    allocate("cuda:0", SIZE).close()
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info(0)[0]
    for _ in range(8):
        allocate("cuda:0", 64 * MIB).close()
    assert torch.cuda.mem_get_info(0)[0] == free
