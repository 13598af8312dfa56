"""Segments in shared memory, between real processes: what is seen, what is refused, what is given back."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from tests.segment_peer import MESSAGE_BYTES, Peer
from tests.support.segments import SIZE, descriptors_of, has_mapping, mapped_here, mappings, open_files
from vcache.errors import ArgumentError, RemoteProtocolError, SegmentError
from vcache.limits import MIB
from vcache.room import memory_room
from vcache.segment import DATA_OFFSET, Segment, allocate, decode_descriptor, map_segment


@pytest.fixture
def segment() -> Iterator[Segment]:
    with allocate("shm:0", SIZE) as made:
        yield made


# -------------------------------------------------------------------------------- between processes


def test_bytes_go_both_ways_between_processes(segment: Segment) -> None:
    pattern = torch.arange(SIZE - DATA_OFFSET, dtype=torch.int64).to(torch.uint8)
    view = segment.view(DATA_OFFSET, SIZE - DATA_OFFSET)
    view.copy_(pattern)
    with Peer() as peer:
        assert peer.map(segment) == "shm:0"
        assert peer.ask(f"read {DATA_OFFSET} 300") == bytes(pattern[:300].numpy()).hex()
        assert peer.ask(f"read {SIZE - 7} 7") == bytes(pattern[-7:].numpy()).hex()
        assert peer.ask(f"fill {DATA_OFFSET + 10} 5 99") == "done"
    expected = pattern.clone()
    expected[10:15] = 99
    assert torch.equal(view, expected)


def test_devices_are_labels_and_identities_are_random() -> None:
    with allocate("shm:0", SIZE) as one, allocate("shm:17", SIZE) as two:
        assert (one.device, two.device) == ("shm:0", "shm:17")
        assert one.segment_id != two.segment_id
        assert one.incarnation != two.incarnation
        assert one.incarnation > 0
        assert one.size == SIZE
        mapped = mapped_here(two)
        assert mapped.device == "shm:17"
        mapped.retire()


def test_the_importer_sees_the_end_of_an_incarnation(segment: Segment) -> None:
    with Peer() as peer:
        peer.map(segment)
        assert peer.ask("incarnation") == str(segment.incarnation)
        assert segment.close()
        assert peer.ask("incarnation") == "0"
        assert peer.ask(f"read {DATA_OFFSET} 2") == "0000", "the importer keeps the memory until it lets go"
        assert peer.ask("retire") == "True"
        assert peer.ask("incarnation") == "0"
    assert segment.incarnation_now() == 0


def test_the_importers_memory_survives_the_holder() -> None:
    holder = (
        "import socket, sys\n"
        "from vcache.segment import DATA_OFFSET, allocate\n"
        "segment = allocate('shm:0', 1 << 20)\n"
        "segment.view(DATA_OFFSET, 100).fill_(42)\n"
        "encoded, fd = segment.descriptor()\n"
        "socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [encoded], [fd])\n"
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        command = [sys.executable, "-c", holder, str(theirs.fileno())]
        subprocess.run(command, pass_fds=[theirs.fileno()], check=True)
        encoded, fds, _, _ = socket.recv_fds(ours, MESSAGE_BYTES, 1)
        mapped = map_segment(decode_descriptor(encoded), fds[0])
        os.close(fds[0])
    assert bytes(mapped.view(DATA_OFFSET, 100).numpy()) == b"*" * 100
    mapped.retire()


def test_after_fork_the_child_has_neither_memory_nor_descriptor() -> None:
    script = """
import os
from vcache.errors import ForkedProcess
from vcache.segment import DATA_OFFSET, allocate, decode_descriptor, map_segment
segment = allocate("shm:0", 1 << 20)
encoded, fd = segment.descriptor()
mapped = map_segment(decode_descriptor(encoded), fd)
borrow = mapped.borrow()
child = os.fork()
if child == 0:
    assert "memfd:vcache-" not in open("/proc/self/maps").read()
    open_files = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
    assert not any("memfd" in os.readlink(path) for path in open_files if os.path.lexists(path))
    for memory in (segment, mapped):
        assert memory.borrow() is None and memory.incarnation_now() == 0
        try:
            memory.view(DATA_OFFSET, 1)
        except ForkedProcess:
            pass
        else:
            os._exit(3)
    borrow.release()
    mapped.retire(lambda: os._exit(4))
    segment.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert segment.incarnation_now() == mapped.incarnation_now() == segment.incarnation
assert mapped.borrows == 1
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_an_importers_copy_delays_unmapping_and_not_the_end(segment: Segment) -> None:
    """The holder ends it while the importer copies: no new copy begins, this one goes on, then it is gone."""
    segment.poke(DATA_OFFSET, b"warm")
    with Peer() as peer, Peer() as idle:
        for each in (peer, idle):
            assert each.map(segment) == "shm:0"
        before = descriptors_of(peer)
        assert peer.ask("borrow") == "True"
        assert segment.close(), "the holder waits for nobody: the memory is the importers' too"
        assert peer.ask("incarnation") == "0", "what was read since counts as a miss"
        assert (peer.ask("retire"), idle.ask("retire")) == ("False", "True")
        assert (has_mapping(peer), has_mapping(idle)) == (True, False)
        assert peer.ask("borrow") == "False"
        assert peer.ask(f"peek {DATA_OFFSET} 4") == b"warm".hex()
        assert peer.ask("release") == "True"
        assert not has_mapping(peer)
        assert descriptors_of(peer) == before


def test_a_holders_own_copy_delays_its_freeing(segment: Segment) -> None:
    borrow = segment.borrow()
    assert borrow is not None
    with Peer() as peer:
        peer.map(segment)
        assert not segment.close()
        assert peer.ask("incarnation") == "0"
        assert peer.ask(f"poke {DATA_OFFSET} 2a") == "done", (
            "a late write is nobody's loss: the memory is there"
        )
        assert segment.peek(DATA_OFFSET, 1) == b"*"
        borrow.release()
        assert segment.gone


def test_an_importer_that_is_killed_in_its_copy_leaves_the_holder_alone(segment: Segment) -> None:
    with Peer() as peer, Peer() as other:
        for each in (peer, other):
            each.map(segment)
            assert each.ask("borrow") == "True"
        peer.process.kill()
        peer.process.wait(60)
        assert segment.incarnation_now() == segment.incarnation
        assert other.ask(f"poke {DATA_OFFSET} 07") == "done"
        assert segment.peek(DATA_OFFSET, 1) == b"\7"
        assert other.ask("release") == "False", "nobody has retired it"


# -------------------------------------------------------------------------------- refused: sizes


@pytest.mark.parametrize("size", [0, -4096, 4096, 4097, 1 * MIB + 1])
def test_a_size_that_is_no_multiple_of_a_page_is_refused(size: int) -> None:
    with pytest.raises(ArgumentError, match=f"size: got {size}, wanted a multiple of"):
        allocate("shm:0", size)


@pytest.mark.parametrize("device", ["shm", "shm:", "shm:-1", "cpu:0", "shm:0 ", "SHM:0", "shm:99999"])
def test_a_device_that_there_is_not_is_refused(device: str) -> None:
    with pytest.raises(ArgumentError, match="device: got"):
        allocate(device, SIZE)


def test_a_segment_larger_than_memory_is_refused_at_once() -> None:
    before = mappings(), open_files()
    room = memory_room()
    page = os.sysconf("SC_PAGE_SIZE")
    for size in (room.total // page * page, 1 << 45, 1 << 61):
        with pytest.raises(SegmentError, match=r"does not fit: there are \d+ MiB available of \d+ MiB"):
            allocate("shm:0", size)
    assert (mappings(), open_files()) == before


def test_numa_node() -> None:
    with pytest.raises(SegmentError, match=r"numa: got 999, wanted one of the nodes with memory: \[0"):
        allocate("shm:0", SIZE, numa=999)
    try:
        made = allocate("shm:0", SIZE, numa=0)
    except SegmentError as error:
        pytest.skip(f"this container may not: {error}")
    with made:
        assert made.view(DATA_OFFSET, 1).numel() == 1


def test_bytes_are_copied_out_and_in_without_torch(segment: Segment) -> None:
    mapped = mapped_here(segment)
    segment.poke(DATA_OFFSET, b"written by the holder")
    assert mapped.peek(DATA_OFFSET + 11, 10) == b"the holder"
    mapped.poke(SIZE - 8, b"importer")
    assert segment.peek(SIZE - 8, 8) == b"importer"
    for memory in (segment, mapped):
        with pytest.raises(RemoteProtocolError, match="got offset 0 and length 4"):
            memory.poke(0, b"head")
        with pytest.raises(RemoteProtocolError, match="extent: got offset"):
            memory.peek(SIZE - 8, 9)
    mapped.retire()
    with pytest.raises(SegmentError, match="not mapped any more"):
        mapped.peek(DATA_OFFSET, 1)


def test_nothing_leaks() -> None:
    before = mappings(), open_files()
    for _ in range(3):
        with allocate("shm:0", SIZE) as segment:
            mapped = mapped_here(segment)
            mapped.view(DATA_OFFSET, 16).fill_(1)
            mapped.retire()
        with pytest.raises(SegmentError):
            allocate("shm:0", SIZE, numa=999)
    assert (mappings(), open_files()) == before


def test_no_torch_until_somebody_looks() -> None:
    script = (
        "import sys\n"
        "from vcache.segment import allocate\n"
        "segment = allocate('shm:0', 1 << 20)\n"
        "segment.descriptor(), segment.incarnation_now()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
