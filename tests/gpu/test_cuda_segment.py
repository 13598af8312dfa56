"""Segments in GPU memory, in both ways in which it can be shared, between real processes. Run with -m gpu."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest
import torch

from tests.segment_peer import MESSAGE_BYTES, Peer
from vcache.errors import ArgumentError, RemoteProtocolError, SegmentError
from vcache.limits import MIB
from vcache.segment import (
    DATA_OFFSET,
    Segment,
    SegmentDescriptor,
    allocate,
    decode_descriptor,
    device_label,
    encode_descriptor,
    map_segment,
    ways,
)
from vcache.segment.cuda import CudaSegment
from vcache.segment.cuda_errors import Way
from vcache.segment.gpu import gpu_uuid

pytestmark = pytest.mark.gpu

SIZE = 8 * MIB
IMPORT_BYTES_MAX = 64 * MIB
"""What one more import may take of a GPU: page tables and the driver's notes. A context takes far more."""


@pytest.fixture(params=list(Way), ids=[way.name for way in Way])
def way(request: pytest.FixtureRequest) -> Way:
    """Each way that works here at all."""
    way: Way = request.param
    try:
        CudaSegment.allocate(0, SIZE, way=way).close()
    except SegmentError as error:
        pytest.skip(str(error))
    return way


@pytest.fixture
def segment(way: Way) -> Iterator[Segment]:
    with CudaSegment.allocate(0, SIZE, way=way) as made:
        yield made


def described(segment: Segment) -> SegmentDescriptor:
    return decode_descriptor(segment.descriptor()[0])


def free_bytes(ordinal: int = 0) -> int:
    torch.cuda.synchronize(ordinal)
    return torch.cuda.mem_get_info(ordinal)[0]


# ------------------------------------------------------------------------------------------ which way


def test_its_uuid_is_the_one_that_nvidia_smi_prints() -> None:
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    assert gpu_uuid(0) in re.findall(r"(?:GPU|MIG)-[0-9a-f-]{36}", listed)


def test_the_way_is_probed_once_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ways, "_best", {})
    caplog.set_level(logging.INFO)
    for _ in range(2):
        with allocate("cuda:0", SIZE) as segment:
            assert described(segment).kind == ways._best[0].value
    said = [record.message for record in caplog.records if "segments are shared by" in record.message]
    print(*said)
    assert len(said) == 1
    assert device_label("cuda:0") in said[0]


def test_when_no_way_works_the_error_has_both_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process sees no GPU, whichever way."""
    monkeypatch.setattr(ways, "_best", {})
    probe = ways.probe

    def blind(segment: Segment, **given: object) -> object:
        return probe(segment, **{**given, "environment": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}})  # type: ignore[arg-type]

    monkeypatch.setattr(ways, "probe", blind)
    with pytest.raises(SegmentError, match=r"by a file descriptor: .*by legacy CUDA IPC: .*device: shm:0"):
        allocate("cuda:0", SIZE)


# ------------------------------------------------------------------------------------------ bytes


def test_the_holder_sees_its_memory(segment: Segment, way: Way) -> None:
    assert segment.device == device_label("cuda:0") == f"cuda:{gpu_uuid(0)}"
    encoded, fd = segment.descriptor()
    assert (fd is not None) == (way is Way.FD)
    assert len(decode_descriptor(encoded).handle) == (64 if way is Way.IPC else 0)
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
        assert peer.map(segment) == segment.device
        assert peer.ask(f"read {DATA_OFFSET} 300") == bytes(pattern[:300].cpu().numpy()).hex()
        assert peer.ask(f"fill {DATA_OFFSET + 10} 5 99") == "done"
        pattern[10:15] = 99
        assert torch.equal(view, pattern)
        assert peer.ask("retire") == "True"
        assert peer.map(segment) == segment.device, "closed and opened again"


def test_several_processes_on_one_gpu(segment: Segment) -> None:
    with Peer() as one, Peer() as two, Peer() as three:
        for byte, peer in enumerate((one, two, three)):
            assert peer.map(segment) == segment.device
            assert peer.ask(f"fill {DATA_OFFSET + byte} 1 {byte + 1}") == "done"
        for peer in (one, two, three):
            assert peer.ask(f"read {DATA_OFFSET} 3") == "010203"


def test_a_process_that_numbers_the_gpus_differently(segment: Segment) -> None:
    with Peer({"CUDA_VISIBLE_DEVICES": gpu_uuid(0)}) as peer:
        assert peer.map(segment) == segment.device
        assert peer.ask(f"fill {DATA_OFFSET} 2 5") == "done"
        assert segment.view(DATA_OFFSET, 2).cpu().tolist() == [5, 5]


def test_another_gpu_of_the_process_maps_it(way: Way) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with CudaSegment.allocate(1, SIZE, way=way) as segment, Peer() as peer:
        segment.view(DATA_OFFSET, 4).fill_(7)
        torch.cuda.synchronize(1)
        assert peer.map(segment) == segment.device
        assert peer.ask(f"read {DATA_OFFSET} 4") == "07070707"


def test_a_gpu_that_the_importer_does_not_see_is_named(way: Way) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with (
        CudaSegment.allocate(1, SIZE, way=way) as segment,
        Peer({"CUDA_VISIBLE_DEVICES": gpu_uuid(0)}) as peer,
    ):
        answer = peer.map(segment)
        print(way.title, "of a GPU that is not visible:", answer)
        assert answer == segment.device or (gpu_uuid(1) in answer and "CUDA_VISIBLE_DEVICES" in answer)


def test_a_mapping_for_reading_cannot_be_written_where_the_driver_guards_it(
    segment: Segment, way: Way
) -> None:
    view = segment.view(DATA_OFFSET, 4)
    view.fill_(9)
    torch.cuda.synchronize()
    with Peer() as reader:
        assert reader.map_for_reading(segment) == segment.device
        writable = reader.ask("writable") == "True"
        print(way.title, "maps for reading:", "writable" if writable else "read-only")
        assert reader.ask(f"read {DATA_OFFSET} 4") == "09090909"
        if writable:
            return
        assert reader.ask(f"poke {DATA_OFFSET} 01").startswith(SegmentError.__name__)
        assert "rror" in reader.ask(f"fill {DATA_OFFSET} 4 1"), "its own use of the GPU ends, nobody else's"
    assert view.cpu().tolist() == [9, 9, 9, 9]


def test_a_segment_of_this_process_itself(segment: Segment, way: Way) -> None:
    encoded, fd = segment.descriptor()
    if way is Way.IPC:
        with pytest.raises(SegmentError, match="holds that segment itself"):
            map_segment(decode_descriptor(encoded), fd, own_device="cuda:0")
        return
    first = map_segment(decode_descriptor(encoded), fd, own_device="cuda:0")
    second = map_segment(decode_descriptor(encoded), fd, own_device="cuda:0")
    first.view(DATA_OFFSET, 3).fill_(8)
    torch.cuda.synchronize()
    assert segment.peek(DATA_OFFSET, 3) == second.peek(DATA_OFFSET, 3) == b"\x08" * 3
    first.retire()
    assert second.peek(DATA_OFFSET, 3) == b"\x08" * 3, "opened once, and closed by the last"
    second.retire()


# ------------------------------------------------------------------------------------------ refused


def test_a_foreign_incarnation_is_refused(segment: Segment) -> None:
    forged = encode_descriptor(msgspec.structs.replace(described(segment), incarnation=7))
    with Peer() as peer:
        assert peer.map_encoded(forged, segment.descriptor()[1]).startswith(RemoteProtocolError.__name__)
        assert peer.map(segment) == segment.device


def test_a_forged_size_is_refused(segment: Segment) -> None:
    fd = segment.descriptor()[1]
    with Peer() as peer:
        for size in (SIZE // 2, 2 * SIZE):
            forged = encode_descriptor(msgspec.structs.replace(described(segment), size=size))
            answer = peer.map_encoded(forged, fd)
            assert answer.startswith((RemoteProtocolError.__name__, SegmentError.__name__)), answer
        assert peer.map(segment) == segment.device


def test_a_forged_handle_or_descriptor_is_an_error_in_words(segment: Segment, way: Way) -> None:
    with Peer() as peer, open(os.devnull) as nothing:
        if way is Way.IPC:
            forged = encode_descriptor(msgspec.structs.replace(described(segment), handle=b"x" * 64))
            answer = peer.map_encoded(forged, None)
        else:
            answer = peer.map_encoded(segment.descriptor()[0], nothing.fileno())
            assert peer.map_encoded(segment.descriptor()[0], None).startswith(RemoteProtocolError.__name__)
        print(answer)
        assert answer.startswith(SegmentError.__name__)
        assert peer.map(segment) == segment.device


def test_the_end_of_an_incarnation_is_in_the_header(way: Way) -> None:
    segment = CudaSegment.allocate(0, SIZE, way=way)
    encoded, fd = segment.descriptor()
    kept = os.dup(fd) if fd is not None else None
    with Peer() as peer:
        assert peer.map(segment) == segment.device
        assert peer.ask("retire") == "True"
        assert segment.close()
        answer = peer.map_encoded(encoded, kept)
        assert answer.split(":")[0] in (SegmentError.__name__, RemoteProtocolError.__name__)
        if kept is not None:
            assert "was closed by its holder" in answer
            os.close(kept)


def test_sizes_and_devices_that_do_not_fit(way: Way) -> None:
    with pytest.raises(ArgumentError, match="2 MiB"):
        CudaSegment.allocate(0, 1 * MIB, way=way)
    with pytest.raises(ArgumentError, match="it sees"):
        CudaSegment.allocate(999, SIZE, way=way)
    with pytest.raises(ArgumentError, match="numa"):
        CudaSegment.allocate(0, SIZE, numa=0, way=way)
    with pytest.raises(SegmentError, match=r"the GPU has \d+ of \d+ MiB free"):
        CudaSegment.allocate(0, 1 << 45, way=way)


# ------------------------------------------------------------------------------------------ others' work


def test_the_current_device_and_a_graph_capture_are_left_alone(way: Way) -> None:
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(1)
    before = torch.cuda.current_device()
    graph = torch.cuda.CUDAGraph()
    work = torch.zeros(1024, device=f"cuda:{before}")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        work.add_(1)
        with CudaSegment.allocate(0, SIZE, way=way):
            pass
    graph.replay()
    torch.cuda.synchronize()
    assert work.sum().item() == 1024
    assert torch.cuda.current_device() == before
    torch.cuda.set_device(0)


HOLDER = """
import socket, sys
from vcache.segment import DATA_OFFSET
from vcache.segment.cuda import CudaSegment
from vcache.segment.cuda_errors import Way
segment = CudaSegment.allocate(0, int(sys.argv[2]), way=Way[sys.argv[3]])
import torch
segment.view(DATA_OFFSET, segment.size - DATA_OFFSET).fill_(42)
torch.cuda.synchronize()
encoded, fd = segment.descriptor()
with socket.socket(fileno=int(sys.argv[1])) as connection:
    socket.send_fds(connection, [encoded], [] if fd is None else [fd])
    connection.recv(1)
"""


@pytest.mark.parametrize("size", [256 * MIB])
def test_a_holder_killed_under_a_looping_kernel(way: Way, size: int) -> None:
    """This process reads the holder's memory when it is killed: the reads end well, the bytes stay right, and
    the memory is given back when it is unmapped here.
    """
    torch.ones(8, dtype=torch.uint8, device="cuda:0").sum(
        dtype=torch.int64
    ).unique()  # kernels take memory too
    before = free_bytes()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        arguments = [str(theirs.fileno()), str(size), way.name]
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, *arguments], pass_fds=[theirs.fileno()])
        theirs.close()
        ours.settimeout(120)
        encoded, fds, _, _ = socket.recv_fds(ours, MESSAGE_BYTES, 1)
        mapped = map_segment(decode_descriptor(encoded), fds[0] if fds else None, own_device="cuda:0")
        for fd in fds:
            os.close(fd)
        borrow = mapped.borrow()
        assert borrow is not None
        view = mapped.view(DATA_OFFSET, size - DATA_OFFSET)
        sums = torch.zeros(400, dtype=torch.int64, device="cuda:0")
        for turn in range(200):
            sums[turn] = view.sum(dtype=torch.int64)
        holder.kill()
        holder.wait(60)
        for turn in range(200, 400):
            sums[turn] = view.sum(dtype=torch.int64)
        torch.cuda.synchronize()
    assert sums.unique().tolist() == [42 * (size - DATA_OFFSET)]
    mapped.retire()
    assert not mapped.gone, "a copy still has it"
    del view
    borrow.release()
    assert mapped.gone
    del sums
    torch.cuda.empty_cache()
    assert before - free_bytes() < IMPORT_BYTES_MAX


# ------------------------------------------------------------------------------------------ memory


def test_what_an_import_takes_of_the_gpu(way: Way) -> None:
    with (
        CudaSegment.allocate(0, 64 * MIB, way=way) as one,
        CudaSegment.allocate(0, 64 * MIB, way=way) as two,
        Peer() as peer,
    ):
        before = free_bytes()
        assert peer.map(one) == one.device
        first = before - free_bytes()
        assert peer.map(two) == two.device
        second = before - first - free_bytes()
        print(f"{way.title}: a first import takes {first / MIB:.0f} MiB, another {second / MIB:.0f} MiB")
        assert first < 2048 * MIB, "a context, and no second one"
        assert second < IMPORT_BYTES_MAX


def test_no_context_on_the_peers_gpu(way: Way) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with CudaSegment.allocate(1, 64 * MIB, way=way) as segment, Peer() as peer:
        before = free_bytes(1)
        assert peer.map(segment) == segment.device
        assert peer.ask(f"peek {DATA_OFFSET} 4")
        taken = before - free_bytes(1)
        print(f"{way.title}: an import from another GPU takes {taken / MIB:.0f} MiB there")
        assert taken < IMPORT_BYTES_MAX


def test_nothing_leaks(way: Way) -> None:
    CudaSegment.allocate(0, SIZE, way=way).close()
    free, files = free_bytes(), len(os.listdir("/proc/self/fd"))
    for _ in range(8):
        CudaSegment.allocate(0, 64 * MIB, way=way).close()
    assert (free_bytes(), len(os.listdir("/proc/self/fd"))) == (free, files)


def test_importing_leaks_nothing(segment: Segment) -> None:
    with Peer() as peer:
        for _ in range(2):
            assert peer.map(segment) == segment.device
            assert peer.ask("retire") == "True"
        there = f"/proc/{peer.process.pid}/fd"
        free, files = free_bytes(), len(os.listdir(there))
        for _ in range(20):
            assert peer.map(segment) == segment.device
            assert peer.ask("retire") == "True"
        assert (free_bytes(), len(os.listdir(there))) == (free, files)


def test_memory_goes_when_holder_and_importers_have_let_go_in_any_order(way: Way) -> None:
    if way is Way.IPC:
        pytest.skip("freeing it under an importer is undefined")
    free = free_bytes()
    segment = CudaSegment.allocate(0, 256 * MIB, way=way)
    segment.poke(DATA_OFFSET, b"kept")
    encoded, fd = segment.descriptor()
    mapped = map_segment(decode_descriptor(encoded), fd, own_device="cuda:0")
    assert segment.close()
    assert mapped.peek(DATA_OFFSET, 4) == b"kept"
    assert free - free_bytes() >= 256 * MIB
    mapped.retire()
    assert free - free_bytes() < IMPORT_BYTES_MAX
