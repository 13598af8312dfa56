"""How much memory there is: the machine's, a container's, and the default made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vcache.limits import GIB, MIB
from vcache.room import Room, default_segment_bytes, gpu_numa_node, memory_room, numa_nodes

MACHINE = "MemTotal: 16777216 kB\nMemFree: 1048576 kB\nMemAvailable: 8388608 kB\n"


def fake_proc(root: Path, cgroup: str, mountinfo: str, meminfo: str = MACHINE) -> Path:
    """A /proc as a container with these control groups would see it."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(meminfo)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mountinfo)
    return root / "proc"


def group(folder: Path, **files: str) -> Path:
    """A control group's folder; a file name's dots are written as double underscores."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content + "\n")
    return folder


def test_this_machine_has_room() -> None:
    room = memory_room()
    assert 0 < room.spendable < room.available <= room.total


def test_without_limits_the_machine_counts(tmp_path: Path) -> None:
    top = group(tmp_path / "cg")
    proc = fake_proc(tmp_path, "0::/\n", f"1 0 0:1 / {top} rw - cgroup2 cgroup2 rw\n")
    assert memory_room(proc=proc) == Room(16 * GIB, 8 * GIB, "the machine's memory")


def test_a_limit_of_version_2_counts_also_when_it_is_an_ancestors(tmp_path: Path) -> None:
    top = group(tmp_path / "cg", memory__stat="")
    group(
        top / "pod",
        memory__max=str(GIB),
        memory__current=str(700 * MIB),
        memory__stat="inactive_file 104857600",
    )
    group(top / "pod/engine", memory__max="max", memory__current="1")
    proc = fake_proc(tmp_path, "0::/pod/engine\n", f"1 0 0:1 / {top} rw - cgroup2 cgroup2 rw\n")
    room = memory_room(proc=proc)
    assert (room.total, room.available) == (GIB, GIB - 700 * MIB + 100 * MIB)
    assert str(top / "pod") in room.limited_by


def test_memory_high_counts_as_a_limit(tmp_path: Path) -> None:
    top = group(tmp_path / "cg", memory__max="max", memory__high=str(GIB), memory__current="0")
    proc = fake_proc(tmp_path, "0::/\n", f"1 0 0:1 / {top} rw - cgroup2 cgroup2 rw\n")
    assert memory_room(proc=proc).available == GIB


def test_a_limit_of_version_1_in_a_container_that_does_not_see_its_own_path(tmp_path: Path) -> None:
    stat = f"inactive_file 1\ntotal_inactive_file {10 * MIB}\ntotal_active_file {20 * MIB}"
    top = group(
        tmp_path / "cg",
        memory__limit_in_bytes=str(512 * MIB),
        memory__usage_in_bytes=str(500 * MIB),
        memory__stat=stat,
    )
    mountinfo = f"1 0 0:1 /docker/f00 {top} rw - cgroup cgroup rw,memory\n"
    proc = fake_proc(tmp_path, "4:cpu,memory:/docker/f00\n0::/\n", mountinfo)
    assert memory_room(proc=proc).available == (512 - 500 + 10 + 10) * MIB


def test_no_limit_in_version_1_is_a_huge_number(tmp_path: Path) -> None:
    top = group(tmp_path / "cg", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="5")
    proc = fake_proc(tmp_path, "4:memory:/\n", f"1 0 0:1 / {top} rw - cgroup cgroup rw,memory\n")
    assert memory_room(proc=proc).limited_by == "the machine's memory"


@pytest.mark.parametrize(
    ("available", "wanted"),
    [
        (0, 64 * MIB),
        (200 * MIB, 64 * MIB),
        (1 * GIB + 12345, 256 * MIB),
        (1003 * MIB, 250 * MIB),
        (100 * GIB, 4 * GIB),
    ],
)
def test_the_default_is_a_quarter_within_bounds(available: int, wanted: int) -> None:
    assert default_segment_bytes(Room(128 * GIB, available, "a test")) == wanted


def test_the_margin_is_small_in_a_small_container() -> None:
    assert Room(512 * MIB, 100 * MIB, "a test").spendable == 84 * MIB
    assert Room(128 * GIB, 10 * GIB, "a test").spendable == 10 * GIB - 512 * MIB


def test_a_numa_node_has_no_more_room_than_the_machine() -> None:
    node = numa_nodes()[0]
    assert 0 < memory_room(node).spendable <= memory_room().total


def test_a_gpu_is_at_a_numa_node(tmp_path: Path) -> None:
    for address, uuid, node in (("0000:17:00.0", "GPU-a", "1"), ("0000:65:00.0", "GPU-b", "-1")):
        group(
            tmp_path / "proc/driver/nvidia/gpus" / address,
            information=f"Model: X\nGPU UUID: \t {uuid}\nIRQ: 9",
        )
        group(tmp_path / "sys/bus/pci/devices" / address, numa_node=node)
    found = [
        gpu_numa_node(f"cuda:GPU-{name}", proc=tmp_path / "proc", sys=tmp_path / "sys") for name in "abc"
    ]
    assert found == [1, None, None]
    assert gpu_numa_node("cuda:GPU-a", proc=tmp_path / "none") is None
