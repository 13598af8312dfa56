"""GPU segments as far as that goes without a GPU: who they are, what peers may say of them, what CUDA's
refusals mean, and how the way is chosen in which they are shared.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.client_pool import pool_in_memory
from tests.processes.content import LAYOUT
from vcache.cli.pool_tables import short_label
from vcache.engine.pool import Pool, _roomiest
from vcache.engine.stats import Counters
from vcache.errors import ArgumentError, RemoteProtocolError, SegmentError
from vcache.limits import MIB
from vcache.protocol import SegmentRow
from vcache.segment import (
    DATA_OFFSET,
    Segment,
    SegmentDescriptor,
    allocate,
    decode_descriptor,
    device_label,
    encode_descriptor,
    map_segment,
)
from vcache.segment.cuda_errors import Facts, Step, Way, advice, in_words
from vcache.segment.gpu import device_label as label_of
from vcache.segment.gpu import uuid_text
from vcache.segment.probe import Probed, probe
from vcache.segment.ways import PREFERRED, first_that_works

UUID = "GPU-5d0b9c6e-7c51-2a5f-90f2-1a2b3c4d5e6f"
OTHER = "GPU-00000000-7c51-2a5f-90f2-1a2b3c4d5e6f"
MIG = "MIG-11111111-7c51-2a5f-90f2-1a2b3c4d5e6f"
BY_FD = SegmentDescriptor("cuda-fd", 2 * MIB, b"i" * 16, 3, f"cuda:{UUID}")
BY_IPC = SegmentDescriptor("cuda", 2 * MIB, b"i" * 16, 3, f"cuda:{MIG}", b"h" * 64)

no_driver = pytest.mark.skipif(
    subprocess.run(
        [sys.executable, "-c", "import ctypes; ctypes.CDLL('libcuda.so.1')"], stderr=subprocess.DEVNULL
    ).returncode
    == 0,
    reason="there is an NVIDIA driver here",
)


# -------------------------------------------------------------------------------- identity


def test_a_gpu_is_called_by_its_uuid_and_a_part_of_one_otherwise() -> None:
    whole = bytes.fromhex("5d0b9c6e7c512a5f90f21a2b3c4d5e6f")
    assert uuid_text(whole, whole) == UUID
    assert uuid_text(whole, b"\x11" * 4 + whole[4:]) == MIG


def test_a_label_means_the_same_in_all_processes() -> None:
    """Two processes number GPUs differently, as CUDA_VISIBLE_DEVICES has it; shm labels stay as they are."""
    ours, theirs = (UUID, OTHER), (OTHER, UUID)
    assert label_of("cuda:0", ours.__getitem__) == label_of("cuda:1", theirs.__getitem__) == f"cuda:{UUID}"
    assert label_of("shm:3", ours.__getitem__) == device_label("shm:3") == "shm:3"
    for wrong in ("cuda", "gpu:0", UUID):
        with pytest.raises(ArgumentError, match="device: got"):
            device_label(wrong)


def test_people_see_the_beginning_of_a_uuid() -> None:
    assert short_label(f"cuda:{UUID}") == "cuda:GPU-5d0b9c6e"
    assert short_label(f"cuda:{MIG}") == "cuda:MIG-11111111"
    assert short_label("shm:12") == "shm:12"


@no_driver
def test_without_a_driver_there_is_no_label_and_no_segment() -> None:
    for attempt in (lambda: allocate("cuda:0", 2 * MIB), lambda: device_label("cuda:0")):
        with pytest.raises(SegmentError, match=r"no NVIDIA driver: .*start it with --gpus"):
            attempt()


@no_driver
@pytest.mark.parametrize("descriptor", [BY_FD, BY_IPC], ids=["by descriptor", "by IPC"])
def test_without_a_driver_a_peers_segment_cannot_be_mapped(descriptor: SegmentDescriptor) -> None:
    with pytest.raises(SegmentError, match="no NVIDIA driver"):
        map_segment(descriptor, 0, own_device="cuda:0")


# -------------------------------------------------------------------------------- descriptors


@pytest.mark.parametrize("descriptor", [BY_FD, BY_IPC], ids=["by descriptor", "by IPC"])
def test_descriptors_of_both_ways_travel(descriptor: SegmentDescriptor) -> None:
    assert decode_descriptor(encode_descriptor(descriptor)) == descriptor


def test_a_descriptor_names_the_gpu() -> None:
    shared = SegmentDescriptor("shm", 2 * MIB, b"i" * 16, 3, "shm:0")
    assert (BY_FD.gpu, BY_IPC.gpu, shared.gpu) == (UUID, MIG, "")


@pytest.mark.parametrize(
    "forged",
    [
        {"device": "cuda:0"},
        {"device": f"cuda:{UUID.upper()}"},
        {"device": f"cuda:{UUID}\n"},
        {"device": f"cuda:{UUID}-0"},
        {"device": "shm:0"},
        {"kind": "shm"},
        {"kind": "cuda"},
        {"kind": "cuda-fabric"},
        {"handle": b"h" * 64},
        {"handle": b"h" * 65},
        {"size": 4096},
        {"incarnation": 0},
    ],
    ids=repr,
)
def test_a_forged_descriptor_is_refused(forged: dict[str, object]) -> None:
    encoded = encode_descriptor(msgspec.structs.replace(BY_FD, **forged))
    with pytest.raises(RemoteProtocolError, match="segment descriptor: "):
        decode_descriptor(encoded)


@pytest.mark.parametrize("length", [0, 63, 65, 256])
def test_a_handle_of_another_length_is_refused(length: int) -> None:
    encoded = encode_descriptor(msgspec.structs.replace(BY_IPC, handle=b"h" * length))
    with pytest.raises(RemoteProtocolError, match="segment descriptor: "):
        decode_descriptor(encoded)


# -------------------------------------------------------------------------------- what CUDA says


def facts(way: Way = Way.FD, **known: object) -> Facts:
    return Facts(way, **known)  # type: ignore[arg-type]


ALONE = {"own": UUID, "seen": (UUID,)}
PEERS = {"own": UUID, "memory_on": OTHER, "seen": (UUID, OTHER)}


@pytest.mark.parametrize(
    ("step", "code", "known", "told"),
    [
        (
            Step.ALLOCATE,
            2,
            {**ALONE, "free_bytes": 7 * MIB, "total_bytes": 80 * MIB},
            "7 of 80 MiB free: ask for",
        ),
        (Step.ALLOCATE, 2, {}, "not enough memory left: ask for less"),
        (Step.MAP, 2, {**PEERS, "total_bytes": 80 * MIB}, "0 of 80 MiB free: a mapping needs"),
        (
            Step.IMPORT,
            101,
            {"own": UUID, "memory_on": OTHER, "seen": (UUID,)},
            f"{OTHER} is not among those .*{UUID}",
        ),
        (Step.IMPORT, 999, {"own": UUID, "memory_on": OTHER, "seen": (UUID,)}, "CUDA_VISIBLE_DEVICES"),
        (Step.IMPORT, 101, {}, "not visible to this process"),
        (Step.MAP, 1, {**PEERS, "peer_access": False}, "no peer access .*topo -p2p"),
        (Step.MAP, 217, {**PEERS, "peer_access": True}, "no peer access"),
        (Step.MAP, 711, {**PEERS, "peer_access": True}, "as many others as it can"),
        (Step.IMPORT, 1, {"own": MIG, "memory_on": UUID, "seen": (MIG, UUID)}, "MIG instances cannot reach"),
        (Step.EXPORT, 801, {"own": MIG, "seen": (MIG,)}, "a MIG instance may not share"),
        (Step.IMPORT, 801, {"own": MIG, "memory_on": MIG, "seen": (MIG,)}, "a MIG instance may not share"),
        (Step.EXPORT, 801, {**ALONE}, "does not export memory as a file descriptor"),
        (Step.EXPORT, 801, {**ALONE, "way": Way.IPC}, "cannot be exported by CUDA IPC"),
        (Step.EXPORT, 1, {**ALONE, "way": Way.IPC}, "cannot be exported by CUDA IPC"),
        (Step.ALLOCATE, 801, {**ALONE}, "no memory that can be exported"),
        (Step.IMPORT, 400, {**PEERS, "peer_access": True, "way": Way.IPC}, "--ipc=host --pid=host"),
        (Step.IMPORT, 304, {**PEERS, "peer_access": True, "way": Way.IPC}, "install cuda-bindings"),
        (Step.IMPORT, 1, {**PEERS, "peer_access": True}, "with the same GPUs and the same driver"),
        (Step.MAP, 1, {**PEERS, "peer_access": True}, "not what its descriptor says"),
        (Step.MAP, 1, {**ALONE}, "cannot map memory that it has allocated"),
        (Step.IMPORT, 800, {**PEERS, "peer_access": True}, "container, MPS or confidential"),
        (Step.ENTER, 46, {}, "nvidia-smi -c DEFAULT"),
        (Step.ENTER, 100, {}, "no GPU is visible"),
        (Step.ENTER, 802, {}, "nvidia-fabricmanager"),
        (Step.ENTER, 803, {}, "restart after the update"),
        (Step.COPY, 700, {**PEERS, "peer_access": False}, "restart it"),
        (Step.COPY, 12345, {}, "vcache doctor"),
    ],
)
def test_what_to_do_about_it(step: Step, code: int, known: dict[str, object], told: str) -> None:
    said = advice(step, code, facts(**known))
    assert re.search(told, said), said


def test_advice_is_there_for_everything() -> None:
    """Whatever CUDA answers wherever it does: one sentence, and never an error of our own."""
    for step in Step:
        for way in Way:
            for code in range(1000):
                for known in (
                    {},
                    ALONE,
                    PEERS,
                    {**PEERS, "peer_access": False},
                    {"own": MIG, "seen": (MIG,)},
                ):
                    assert 10 < len(advice(step, code, facts(way, **known))) < 400


def test_an_error_says_what_failed_what_cuda_said_and_what_to_do() -> None:
    said = in_words(
        Step.EXPORT, "cuMemExportToShareableHandle", 801, "CUDA_ERROR_NOT_SUPPORTED", facts(**ALONE)
    )
    assert said.startswith(
        "GPU memory could not be exported (a file descriptor): cuMemExportToShareableHandle"
    )
    assert "CUDA_ERROR_NOT_SUPPORTED (801); the driver" in said


# -------------------------------------------------------------------------------- which way


def test_the_first_way_that_works_is_taken_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tried: list[Way] = []

    def works(way: Way) -> Probed:
        tried.append(way)
        return Probed("", writable=False)

    assert first_that_works(f"cuda:{UUID}", PREFERRED, works) is Way.FD
    assert tried == [Way.FD]
    assert f"cuda:{UUID}: segments are shared by a file descriptor" in caplog.text
    assert "read-only where they only read" in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_why_the_better_way_was_not_taken_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def only_ipc(way: Way) -> Probed:
        if way is Way.FD:
            raise SegmentError("the driver is too old")
        return Probed("")

    assert first_that_works(f"cuda:{UUID}", PREFERRED, only_ipc) is Way.IPC
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "by legacy CUDA IPC" in record.message
    assert "not by a file descriptor: the driver is too old" in record.message


def test_when_no_way_works_the_error_has_each_ones_reason() -> None:
    def none(way: Way) -> Probed:
        raise SegmentError(f"{way.name} is refused")

    with pytest.raises(SegmentError, match=r"FD is refused; .*IPC is refused; .*device: shm:0"):
        first_that_works(f"cuda:{UUID}", PREFERRED, none)


# -------------------------------------------------------------------------------- the probe


@pytest.fixture
def segment() -> Iterator[Segment]:
    with allocate("shm:0", 2 * MIB) as made:
        yield made


def child(script: str) -> list[str]:
    """A second process that is told nothing else than the socket's number, as sys.argv[1]."""
    return [sys.executable, "-c", script]


def test_a_second_process_maps_reads_and_writes(segment: Segment) -> None:
    """The probe as it runs on a GPU, on shared memory: a real process, real mappings, without torch."""
    assert probe(segment).error == ""
    overwritten = segment.peek(DATA_OFFSET, segment.size - DATA_OFFSET)
    assert len(set(overwritten)) == 256, "random bytes, inverted by the second process"


def test_what_the_second_process_meets_comes_back_in_words(segment: Segment) -> None:
    forged = msgspec.structs.replace(decode_descriptor(segment.descriptor()[0]), incarnation=7)
    segment._descriptor = forged  # what it is given does not fit the memory's header
    with pytest.raises(SegmentError, match="in a second process: segment header: got incarnation"):
        probe(segment)


ASKED = "import sys, socket; it = socket.socket(fileno=int(sys.argv[1])); it.recv(9999);"
HANGS = ASKED + "import signal; signal.pause()"
DIES = "import sys; print('a module is missing', file=sys.stderr); sys.exit(3)"
KILLED = "import os; os.kill(os.getpid(), 9)"
NONSENSE = ASKED + "it.send(b'nonsense')"
READS_WRONG = ASKED + (
    "from vcache.segment.probe import Probed; import msgspec;"
    "it.send(msgspec.msgpack.encode(Probed('', b'?' * 16)))"
)
WRITES_NOTHING = (
    "import sys; from vcache.segment import base, probe; base.MappedSegment.poke = lambda *_: None;"
    "probe.serve(int(sys.argv[1]))"
)


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (HANGS, "gave no answer within 0.5 s"),
        (DIES, "ended with exit code 3: a module is missing"),
        (KILLED, "ended with signal 9"),
        (NONSENSE, "answered nonsense"),
        (READS_WRONG, "read other bytes than were written"),
        (WRITES_NOTHING, "other bytes than a second one wrote"),
    ],
)
def test_a_second_process_that_fails_is_an_error_in_words(segment: Segment, script: str, told: str) -> None:
    with pytest.raises(SegmentError, match=told):
        probe(segment, command=child(script), timeout_s=0.5 if script is HANGS else 60.0)


def test_a_probe_leaves_no_process_and_no_descriptor(segment: Segment) -> None:
    before, children = os.listdir("/proc/self/fd"), own_children()
    for script in (HANGS, DIES):
        with pytest.raises(SegmentError):
            probe(segment, command=child(script), timeout_s=0.2)
    assert os.listdir("/proc/self/fd") == before
    assert own_children() == children


def own_children() -> set[str]:
    """Processes that any thread of this one has started and not waited for."""
    return {
        pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    }


# -------------------------------------------------------------------------------- a holder on our GPU


def row(number: int, device: str, free: int, *, held: bool = True) -> SegmentRow:
    return SegmentRow(number, b"i" * 16, 3, device, 0, 7, 1 << 30, 0, 0, free, held)


def test_the_roomiest_holder_on_our_gpu_is_preferred() -> None:
    rows = [
        row(1, f"cuda:{OTHER}", 900),
        row(2, f"cuda:{UUID}", 100),
        row(3, f"cuda:{UUID}", 200),
        row(4, f"cuda:{UUID}", 300, held=False),
        row(5, "cuda:0", 900),
    ]
    assert _roomiest(rows, f"cuda:{UUID}") == 3
    assert _roomiest(rows, f"cuda:{MIG}") == 0
    assert _roomiest(rows, "shm:0") == 0


@no_driver
def test_an_engine_whose_gpu_is_unknown_prefers_no_holder() -> None:
    """It counts why, and goes on: whatever goes wrong is a miss."""
    with pool_in_memory() as there:
        there.start()
        counters = Counters()
        pool = Pool(there.client("holder", lends=4 * MIB), counters, LAYOUT, "model", "shm:0")
        assert pool._near() != 0, "its own segment"
        pool = Pool(there.client("engine"), counters, LAYOUT, "model", "shm:0")
        assert pool._near() != 0, "the holder's, whose label is shm:0 too"
        pool = Pool(there.client("engine"), counters, LAYOUT, "model", "cuda:0")
        assert pool._near() == 0
        assert counters.snapshot()["failed_dead_holder"] == 1
