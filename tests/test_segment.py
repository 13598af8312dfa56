"""Segments in shared memory, between real processes: what is seen, what is refused, what is given back."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from tests.segment_peer import MESSAGE_BYTES, Peer
from vcache.errors import ArgumentError, RemoteProtocolError, SegmentError
from vcache.limits import MIB
from vcache.room import memory_room
from vcache.segment import (
    DATA_OFFSET,
    MappedSegment,
    Segment,
    SegmentDescriptor,
    allocate,
    decode_descriptor,
    encode_descriptor,
    map_segment,
)

SIZE = 1 * MIB
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@pytest.fixture
def segment() -> Iterator[Segment]:
    with allocate("shm:0", SIZE) as made:
        yield made


def described(segment: Segment) -> SegmentDescriptor:
    return decode_descriptor(segment.descriptor()[0])


def mapped_here(segment: Segment) -> MappedSegment:
    """The segment as an importer has it, in this process."""
    encoded, fd = segment.descriptor()
    return map_segment(decode_descriptor(encoded), fd)


def mappings() -> int:
    """How many segments are mapped into this process."""
    return Path("/proc/self/maps").read_text().count("memfd:vcache-")


def has_mapping(peer: Peer) -> bool:
    """Whether a segment is mapped into the other process."""
    return "memfd:vcache-" in Path(f"/proc/{peer.process.pid}/maps").read_text()


def descriptors_of(peer: Peer) -> int:
    return len(os.listdir(f"/proc/{peer.process.pid}/fd"))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


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


# -------------------------------------------------------------------------------- refused: peers


def memfd(size: int, content: bytes = b"", seals: int = SEALS, *, allocated: bool = True) -> int:
    """A memfd as a peer might send it."""
    fd = os.memfd_create("vcache-forged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if allocated:
        os.posix_fallocate(fd, 0, size)
    os.pwrite(fd, content, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def header_of(segment: Segment) -> bytes:
    fd = segment.descriptor()[1]
    assert fd is not None
    return os.pread(fd, DATA_OFFSET, 0)


def refused(descriptor: SegmentDescriptor, fd: int, error: type[Exception], match: str) -> None:
    """Mapping it raises, and leaves nothing behind."""
    before = mappings(), open_files()
    try:
        with pytest.raises(error, match=match):
            map_segment(descriptor, fd)
        assert (mappings(), open_files()) == before
    finally:
        os.close(fd)


def test_a_file_that_could_shrink_is_refused(segment: Segment) -> None:
    for seals in (0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW):
        fd = memfd(SIZE, header_of(segment), seals)
        refused(described(segment), fd, RemoteProtocolError, "got seals")


def test_a_file_that_is_no_memfd_is_refused(segment: Segment, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE))
    fd = os.open(tmp_path / "file", os.O_RDWR)
    refused(described(segment), fd, RemoteProtocolError, "segment file: ")


def test_a_file_of_another_size_is_refused(segment: Segment) -> None:
    for size in (SIZE - 4096, SIZE + 4096):
        fd = memfd(size, header_of(segment))
        refused(described(segment), fd, RemoteProtocolError, f"got {size} bytes, wanted {SIZE}")


def test_a_file_with_holes_is_refused(segment: Segment) -> None:
    fd = memfd(SIZE, header_of(segment), allocated=False)
    refused(described(segment), fd, RemoteProtocolError, "are allocated")


def test_a_file_without_a_header_is_refused(segment: Segment) -> None:
    refused(described(segment), memfd(SIZE), RemoteProtocolError, "magic")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("segment_id", b"x" * 16, "got id"),
        ("incarnation", 7, "got incarnation"),
        ("size", SIZE + 4096, "got 1048576 bytes, wanted 1052672"),
    ],
)
def test_a_descriptor_that_disagrees_with_the_header_is_refused(
    segment: Segment, field: str, value: object, match: str
) -> None:
    fd = segment.descriptor()[1]
    assert fd is not None
    forged = msgspec.structs.replace(described(segment), **{field: value})
    refused(forged, os.dup(fd), RemoteProtocolError, match)


def test_a_header_of_another_size_or_version_is_refused(segment: Segment) -> None:
    header = bytearray(header_of(segment))
    header[16:24] = (SIZE // 2).to_bytes(8, "little")
    refused(described(segment), memfd(SIZE, bytes(header)), RemoteProtocolError, "got size 524288")
    header = bytearray(header_of(segment))
    header[8] = 9
    refused(described(segment), memfd(SIZE, bytes(header)), SegmentError, "got version 9, wanted 1")


def test_an_ended_incarnation_is_not_mapped(segment: Segment) -> None:
    encoded, fd = segment.descriptor()
    assert fd is not None
    kept = os.dup(fd)
    segment.close()
    refused(decode_descriptor(encoded), kept, SegmentError, "was closed by its holder")


def test_without_its_file_shared_memory_is_not_mapped(segment: Segment) -> None:
    with pytest.raises(RemoteProtocolError, match="without a file descriptor"):
        map_segment(described(segment), None)


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"\xff",
        b"x" * 5000,
        msgspec.msgpack.encode(["shm", 1 * MIB, b"short", 1, "shm:0"]),
        msgspec.msgpack.encode(["disk", 1 * MIB, b"x" * 16, 1, "shm:0"]),
        msgspec.msgpack.encode(["shm", 100, b"x" * 16, 1, "shm:0"]),
        msgspec.msgpack.encode(["shm", -1, b"x" * 16, 1, "shm:0"]),
        msgspec.msgpack.encode(["shm", 1 << 63, b"x" * 16, 1, "shm:0"]),
        msgspec.msgpack.encode(["shm", 1 * MIB, b"x" * 16, 0, "shm:0"]),
        msgspec.msgpack.encode(["shm", 1 * MIB, b"x" * 16, 1, "x" * 99]),
    ],
)
def test_a_malformed_descriptor_is_refused(encoded: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="segment descriptor"):
        decode_descriptor(encoded)


def test_the_largest_incarnation_travels(segment: Segment) -> None:
    one = msgspec.structs.replace(described(segment), incarnation=2**64 - 1)
    assert decode_descriptor(encode_descriptor(one)) == one


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 1),
        (DATA_OFFSET - 1, 2),
        (DATA_OFFSET, 0),
        (DATA_OFFSET, -1),
        (SIZE, 1),
        (SIZE - 4, 5),
        (1 << 63, 1),
    ],
)
def test_an_extent_outside_the_data_is_refused(segment: Segment, offset: int, length: int) -> None:
    mapped = mapped_here(segment)
    for memory in (segment, mapped):
        with pytest.raises(RemoteProtocolError, match=f"got offset {offset} and length {length}"):
            memory.view(offset, length)
    mapped.retire()


# -------------------------------------------------------------------------------- borrows


def test_a_retired_segment_is_unmapped_when_the_last_borrow_ends(segment: Segment) -> None:
    before = mappings()
    mapped = mapped_here(segment)
    calls: list[int] = []
    first, second = mapped.borrow(), mapped.borrow()
    assert first is not None
    assert second is not None
    assert mapped.borrows == 2
    view = mapped.view(DATA_OFFSET, 8)
    mapped.retire(lambda: calls.append(1))
    assert mapped.borrow() is None, "no new borrow: a miss"
    first.release()
    first.release()
    assert (calls, mapped.gone, mappings()) == ([], False, before + 1)
    view.fill_(5)
    other = threading.Thread(target=second.release)
    other.start()
    other.join()
    assert (calls, mapped.gone, mappings()) == ([1], True, before)
    assert bytes(segment.view(DATA_OFFSET, 8).numpy()) == b"\5" * 8
    mapped.retire(lambda: calls.append(2))
    assert calls == [1, 2]
    with pytest.raises(SegmentError, match="not mapped any more"):
        mapped.view(DATA_OFFSET, 8)


def test_an_idle_segment_is_unmapped_at_once(segment: Segment) -> None:
    mapped = mapped_here(segment)
    before = mappings()
    calls: list[int] = []
    mapped.retire(lambda: calls.append(1))
    assert (calls, mapped.gone, mapped.borrow(), mappings()) == ([1], True, None, before - 1)


def test_a_view_that_is_kept_does_not_keep_the_mapping(segment: Segment) -> None:
    mapped = mapped_here(segment)
    view = mapped.view(DATA_OFFSET, 8)
    before = mappings()
    mapped.retire()
    assert mappings() == before - 1
    assert view.numel() == 8, "the tensor is there, what it points to is not"


def test_a_borrow_ends_with_its_block_also_by_an_error(segment: Segment) -> None:
    mapped = mapped_here(segment)

    def copy() -> None:
        borrow = mapped.borrow()
        assert borrow is not None
        with borrow:
            raise ValueError("a copy failed")

    with pytest.raises(ValueError, match="a copy failed"):
        copy()
    assert mapped.borrows == 0
    mapped.retire()
    assert mapped.gone


def test_what_a_callback_raises_does_not_reach_the_copy(
    segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    mapped = mapped_here(segment)
    borrow = mapped.borrow()
    assert borrow is not None

    def broken() -> None:
        raise ValueError("cannot acknowledge")

    calls: list[int] = []
    mapped.retire(broken)
    mapped.retire(lambda: calls.append(1))
    borrow.release()
    assert calls == [1]
    assert "cannot acknowledge" in caplog.text


def test_many_threads_borrow_while_it_is_retired(segment: Segment) -> None:
    mapped = mapped_here(segment)
    calls: list[int] = []
    ready = threading.Barrier(9)

    def copies() -> None:
        ready.wait(10)
        while (borrow := mapped.borrow()) is not None:
            with borrow:
                mapped.view(DATA_OFFSET, 64).fill_(1)

    threads = [threading.Thread(target=copies) for _ in range(8)]
    for thread in threads:
        thread.start()
    ready.wait(10)
    for _ in range(3):
        mapped.retire(lambda: calls.append(1))
    for thread in threads:
        thread.join(30)
    assert (calls, mapped.borrows, mapped.gone) == ([1, 1, 1], 0, True)


def test_closing_waits_for_running_copies() -> None:
    segment = allocate("shm:0", SIZE)
    borrow = segment.borrow()
    assert borrow is not None
    view = segment.view(DATA_OFFSET, 4)
    assert not segment.close()
    assert segment.borrow() is None
    assert segment.incarnation_now() == 0, "nobody counts a hit any more"
    view.fill_(1)
    with pytest.raises(SegmentError, match="is closed"):
        segment.descriptor()
    threading.Thread(target=borrow.release).start()
    assert segment.close(wait_s=30)
    assert segment.gone
    assert segment.close()


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


# -------------------------------------------------------------------------------- registered memory


class Registrar:
    """What plays the driver: remembers what is registered, and how many segments were mapped at its end."""

    def __init__(self, error: str = "") -> None:
        self.asked: list[tuple[int, int]] = []
        self.mapped_at_the_end: list[int] = []
        self._error = error

    def __call__(self, address: int, size: int) -> Callable[[], None]:
        self.asked.append((address, size))
        if self._error:
            raise SegmentError(self._error)
        return lambda: self.mapped_at_the_end.append(mappings())


@pytest.mark.parametrize("held", [True, False], ids=["held here", "a peer's"])
def test_memory_is_registered_once_and_until_it_is_unmapped(segment: Segment, held: bool) -> None:
    memory: Segment | MappedSegment = segment if held else mapped_here(segment)
    registrar, before = Registrar(), mappings()
    for _ in range(2):
        memory.register(registrar)
    assert registrar.asked == [(memory.view(DATA_OFFSET, 1).data_ptr() - DATA_OFFSET, SIZE)]
    borrow = memory.borrow()
    assert borrow is not None
    if isinstance(memory, MappedSegment):
        memory.retire()
    else:
        memory.close()
    assert registrar.mapped_at_the_end == [] and mappings() == before
    borrow.release()
    assert registrar.mapped_at_the_end == [before] and mappings() == before - 1


def test_memory_that_cannot_be_registered_is_not_tried_again(segment: Segment) -> None:
    registrar = Registrar("no pages may be locked")
    for _ in range(2):
        with pytest.raises(SegmentError, match="no pages may be locked"):
            segment.register(registrar)
    assert len(registrar.asked) == 1
    assert segment.close()
