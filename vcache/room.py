"""How much memory there is for a segment: the machine's, the containers' around us, a NUMA node's.

The size of /dev/shm does not matter: a memfd lies on the kernel's own tmpfs, which has no size limit (seen on
Linux 6.18: 256 MiB in a memfd while /dev/shm was mounted with 1 MiB). For the same reason the kernel does not
refuse a memfd that is too large: `posix_fallocate` of more than there is ends in the OOM killer, not in
ENOSPC. So whoever allocates asks here first.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vcache.limits import (
    MEMORY_MARGIN_BYTES_MAX,
    MEMORY_MARGIN_SHARE,
    MIB,
    SEGMENT_ALIGN_BYTES,
    SEGMENT_BYTES_DEFAULT_MAX,
    SEGMENT_BYTES_DEFAULT_MIN,
    SEGMENT_DEFAULT_SHARE,
)

_PROC = Path("/proc")
_NUMA = Path("/sys/devices/system/node")


@dataclass(frozen=True)
class Room:
    """Memory of the tightest limit around this process, in bytes.

    available: free, or reclaimable without swapping. limited_by: that limit in words.
    """

    total: int
    available: int
    limited_by: str

    @property
    def spendable(self) -> int:
        """What a segment may take: the available bytes less a margin that keeps the OOM killer away."""
        return max(0, self.available - min(MEMORY_MARGIN_BYTES_MAX, self.total // MEMORY_MARGIN_SHARE))

    def __str__(self) -> str:
        return (
            f"{self.available // MIB} MiB available of {self.total // MIB} MiB, of which a segment may take "
            f"{self.spendable // MIB} MiB (limited by {self.limited_by})"
        )


def memory_room(numa: int | None = None, *, proc: Path = _PROC) -> Room:
    """The room that the tightest of machine, control groups and (if given) NUMA node leaves, read now."""
    rooms = [_machine_room(proc), *_cgroup_rooms(proc)]
    if numa is not None:
        rooms.append(_numa_room(numa))
    return min(rooms, key=lambda room: room.spendable)


def default_segment_bytes(room: Room | None = None) -> int:
    """The size where nobody gave one: a quarter of what is available, 64 MiB to 4 GiB, in whole 2 MiB."""
    available = (room or memory_room()).available
    wanted = min(available // SEGMENT_DEFAULT_SHARE, SEGMENT_BYTES_DEFAULT_MAX)
    return max(wanted // SEGMENT_ALIGN_BYTES * SEGMENT_ALIGN_BYTES, SEGMENT_BYTES_DEFAULT_MIN)


def numa_nodes() -> list[int]:
    """The NUMA nodes of this machine that have memory; [0] where the kernel does not say."""
    for name in ("has_memory", "online"):
        path = _NUMA / name
        if path.exists():
            return _parse_list(path.read_text())
    return [0]


def gpu_numa_node(label: str, *, proc: Path = _PROC, sys: Path = Path("/sys")) -> int | None:
    """The NUMA node that a GPU ("cuda:GPU-…") is at; None where the driver or the kernel does not say."""
    uuid = label.partition(":")[2]
    for told in sorted((proc / "driver/nvidia/gpus").glob("*/information")):
        if uuid in told.read_text(errors="replace").split():
            node = _number(sys / "bus/pci/devices" / told.parent.name / "numa_node")
            return node if node is not None and node >= 0 else None
    return None


def _machine_room(proc: Path) -> Room:
    fields = _fields((proc / "meminfo").read_text())
    total = fields["MemTotal:"] * 1024
    return Room(total, fields.get("MemAvailable:", fields["MemFree:"]) * 1024, "the machine's memory")


def _numa_room(numa: int) -> Room:
    """A node's free memory and what it can reclaim, by the rule of `_reclaimable`."""
    path = _NUMA / f"node{numa}" / "meminfo"
    if not path.exists():  # a kernel without NUMA: its one node is the machine
        return _machine_room(_PROC)
    # Lines read "Node 0 MemFree:  1234 kB".
    fields = _fields("\n".join(line.split(maxsplit=2)[2] for line in path.read_text().splitlines() if line))
    cache = fields.get("Inactive(file):", 0) + fields.get("Active(file):", 0) // 2
    return Room(fields["MemTotal:"] * 1024, (fields["MemFree:"] + cache) * 1024, f"NUMA node {numa}")


def _cgroup_rooms(proc: Path) -> list[Room]:
    """The room in every control group around this process that has a memory limit, version 1 or 2."""
    rooms = []
    for folder, top, version in _cgroup_folders(proc):
        while True:
            room = _cgroup_room(folder, version)
            if room is not None:
                rooms.append(room)
            if folder == top:
                break
            folder = folder.parent
    return rooms


def _cgroup_folders(proc: Path) -> list[tuple[Path, Path, int]]:
    """Our own folder and the topmost visible one of each hierarchy that can limit memory."""
    if not (proc / "self/cgroup").exists():  # a kernel without control groups
        return []
    ours: dict[int, str] = {}
    for line in (proc / "self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            ours[2] = path
        elif "memory" in controllers.split(","):
            ours[1] = path
    found = []
    for line in (proc / "self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, mount_point = before.split()[3:5]
        kind, _, options = after.split(maxsplit=2)
        version = 2 if kind == "cgroup2" else 1 if kind == "cgroup" and "memory" in options.split(",") else 0
        if version in ours:
            top = Path(mount_point)
            found.append((_within(top, root, ours[version]), top, version))
    return found


def _within(top: Path, root: str, path: str) -> Path:
    """Where `path` of the hierarchy is visible under a mount of its part `root`.

    A container sees its own group as the mount's root; where the path is still the host's, `top` is it.
    """
    relative = os.path.relpath(path, root)
    folder = top / relative
    return folder if not relative.startswith("..") and folder.is_dir() else top


def _cgroup_room(folder: Path, version: int) -> Room | None:
    limits, usage_name = (
        (("memory.max", "memory.high"), "memory.current")
        if version == 2
        else (("memory.limit_in_bytes",), "memory.usage_in_bytes")
    )
    given = [limit for limit in (_number(folder / name) for name in limits) if limit is not None]
    usage = _number(folder / usage_name)
    if not given or usage is None:
        return None
    limit = min(given)
    stat = folder / "memory.stat"
    fields = _fields(stat.read_text()) if stat.exists() else {}
    available = max(0, limit - usage + _reclaimable(fields, "total_" if version == 1 else ""))
    return Room(limit, min(available, limit), f"control group {folder}")


def _reclaimable(fields: dict[str, int], prefix: str) -> int:
    """Page cache that goes before anything is killed: the inactive part, and half of the active one."""
    return fields.get(f"{prefix}inactive_file", 0) + fields.get(f"{prefix}active_file", 0) // 2


def _number(path: Path) -> int | None:
    """The number in a control file; None where there is no file, no right to read it, or no limit ("max")."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < 1 << 62 else None


def _fields(text: str) -> dict[str, int]:
    """The first number of each line by its first word."""
    rows = (line.split() for line in text.splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}


def _parse_list(text: str) -> list[int]:
    """A kernel's list such as "0-2,5" as numbers."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            numbers.extend(range(int(first), int(last or first) + 1))
    return numbers
