"""The local tier with its owner: real processes, killed, stopped, out of disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.client_pool import alive, descriptors
from tests.processes.worker import eventually
from vcache.errors import ArgumentError, ConfigError, EngineClosed, Unavailable
from vcache.limits import MIB
from vcache.tiers import Tier
from vcache.tiers.rocksdb import files
from vcache.tiers.rocksdb.messages import Put, Write
from vcache.tiers.rocksdb.owner import LOG
from vcache.tiers.rocksdb.tier import RocksTier

LAYOUT, OTHER = b"L" * 16, b"O" * 16
SIZE = 256 << 10
DEADLINE_S = 60.0


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def chunk(number: int, size: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def is_here(tier: Tier, number: int, size: int = SIZE, layout: bytes = LAYOUT) -> bool:
    """Whether the tier has it; that its bytes are right is asserted."""
    into = torch.zeros(size, dtype=torch.uint8)
    if tier.get(key(number), into, layout) is None:
        return False
    assert torch.equal(into, chunk(number, size))
    return True


class Owners:
    """Tiers of one directory, and the owner behind them, ended with the test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tiers: list[RocksTier] = []
        self.pids: set[int] = set()

    def tier(
        self, capacity_bytes: int = 256 * MIB, deadline_s: float = DEADLINE_S, **given: float
    ) -> RocksTier:
        made = RocksTier(self.path, capacity_bytes=capacity_bytes, deadline_s=deadline_s, **given)  # type: ignore[arg-type]
        self.tiers.append(made)
        self.pids.add(made.state().pid)
        return made

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the owner and wait until it is gone."""
        for pid in list(self.pids):
            if alive(pid):
                os.kill(pid, number)
            eventually(lambda pid=pid: not alive(pid), f"owner {pid} ends")  # type: ignore[misc]
        self.pids.clear()

    def close(self) -> None:
        for tier in self.tiers:
            tier.close()
        for pid in self.pids:
            if alive(pid):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def owners(tmp_path: Path) -> Iterator[Owners]:
    made = Owners(tmp_path / "tier")
    yield made
    made.close()


def test_it_is_a_tier(owners: Owners) -> None:
    tier = owners.tier()
    assert isinstance(tier, Tier)
    assert tier.put(key(1), chunk(1), LAYOUT)
    assert tier.contains([key(1), key(2)]) == [True, False]
    assert is_here(tier, 1)
    assert not is_here(tier, 2)
    assert tier.remove([key(1), key(2)]) == 1
    assert not is_here(tier, 1)
    tier.put(key(3), chunk(3), LAYOUT)
    tier.clear()
    assert tier.contains([key(3)]) == [False]


def test_an_expiry_is_told(owners: Owners) -> None:
    tier = owners.tier()
    tier.put(key(1), chunk(1), LAYOUT, 1 << 42)
    tier.put(key(2), chunk(2), LAYOUT, 1)
    found = tier.get(key(1), torch.empty(SIZE, dtype=torch.uint8), LAYOUT)
    assert found is not None
    assert found.expires_ms == 1 << 42
    assert not is_here(tier, 2)


def test_a_newer_engine_changes_the_settings(owners: Owners) -> None:
    first = owners.tier()
    first.put(key(1), chunk(1), LAYOUT)
    second = owners.tier(capacity_bytes=MIB, ttl_s=3_600.0)
    state = first.state()
    assert (state.capacity_bytes, state.ttl_s) == (MIB, 3_600.0)
    assert is_here(second, 1)
    observer = RocksTier(owners.path, capacity_bytes=2 * MIB, observes=True)
    owners.tiers.append(observer)
    assert observer.state().capacity_bytes == MIB


def test_who_only_looks_starts_an_owner_that_evicts_nothing(owners: Owners) -> None:
    tier = owners.tier()
    for number in range(1, 9):
        assert tier.put(key(number), chunk(number), LAYOUT)
    tier.close()
    owners.kill()
    observer = owners.tier(capacity_bytes=MIB, ttl_s=1e-3, observes=True)
    state = observer.state()
    assert (state.records, state.capacity_bytes, state.ttl_s) == (8, 0, 0.0)
    before = list(observer.rows())
    assert all(is_here(observer, number) for number in range(8, 0, -1))
    assert list(observer.rows()) == before, "looking at records is no use of them"
    assert owners.tier(capacity_bytes=MIB).state().capacity_bytes == MIB
    eventually(lambda: observer.state().records < 4, "an engine's settings count")


def test_a_directory_that_was_removed_is_made_anew_with_another_owner(owners: Owners) -> None:
    tier = owners.tier()
    assert tier.put(key(1), chunk(1), LAYOUT)
    before = tier.state().pid
    shutil.rmtree(owners.path)
    eventually(lambda: not alive(before), "the owner ends")

    def is_put() -> bool:
        try:
            return tier.put(key(2), chunk(2), LAYOUT)
        except (Unavailable, OSError):  # a link to the old owner
            return False

    eventually(is_put, "there is another one")
    owners.pids.add(tier.state().pid)
    assert is_here(tier, 2) and not is_here(tier, 1)


def test_a_file_that_the_index_does_not_know_is_removed_when_it_is_no_record(owners: Owners) -> None:
    tier = owners.tier()
    path = Path(files.path_of(owners.path, key(1)))
    path.write_bytes(b"no record")
    assert not is_here(tier, 1)
    assert not path.exists()
    assert tier.state().counters["damaged"] == 1
    assert "owns the database" in (owners.path / LOG).read_text()


def test_a_record_that_cannot_be_removed_is_not_said_to_be(owners: Owners) -> None:
    tier = owners.tier()
    assert tier.put(key(1), chunk(1), LAYOUT) and tier.put(key(2), chunk(2), LAYOUT)
    path = files.path_of(owners.path, key(1))
    os.unlink(path)
    os.mkdir(path)
    for forget in (lambda: tier.remove([key(1), key(2)]), tier.clear):
        with pytest.raises(Unavailable, match="cannot be removed"):
            forget()
    assert not is_here(tier, 1) and not is_here(tier, 2)
    os.rmdir(path)
    tier.clear()


def test_two_engines_share_one_owner(owners: Owners) -> None:
    first, second = owners.tier(), owners.tier()
    assert first.state().pid == second.state().pid
    first.put(key(1), chunk(1), LAYOUT)
    assert is_here(second, 1)


def test_engines_may_name_the_directory_by_different_paths(owners: Owners, tmp_path: Path) -> None:
    assert owners.tier().put(key(1), chunk(1), LAYOUT)
    (tmp_path / "link").symlink_to(owners.path)
    other = RocksTier(tmp_path / "link", capacity_bytes=256 * MIB, deadline_s=DEADLINE_S)
    owners.tiers.append(other)
    assert is_here(other, 1)
    assert other.put(key(2), chunk(2), LAYOUT)
    assert is_here(owners.tiers[0], 2)


def test_a_file_that_somebody_removed_is_missed_once_and_then_put_anew(owners: Owners) -> None:
    tier = owners.tier()
    assert tier.put(key(1), chunk(1), LAYOUT)
    os.unlink(files.path_of(owners.path, key(1)))
    assert not is_here(tier, 1)
    assert tier.contains([key(1)]) == [False]
    assert tier.put(key(1), chunk(1), LAYOUT) and is_here(tier, 1)


def test_an_owner_that_is_killed_under_a_write_leaves_no_draft(
    owners: Owners, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = owners.tier()
    write = files.write

    def write_late(*given: Any) -> None:
        owners.kill()
        write(*given)

    monkeypatch.setattr(files, "write", write_late)
    with pytest.raises(ConnectionError):
        tier.put(key(1), chunk(1), LAYOUT)
    assert list((owners.path / "chunks/new").iterdir()) == []


def test_a_record_of_another_length_or_layout_is_a_miss_and_deleted(owners: Owners) -> None:
    tier = owners.tier()
    for number in (1, 2):
        tier.put(key(number), chunk(number), LAYOUT)
    assert not is_here(tier, 1, size=SIZE // 2)
    assert tier.get(key(2), torch.empty(SIZE, dtype=torch.uint8), OTHER) is None
    assert tier.contains([key(1), key(2)]) == [False, False]


def test_damaged_bytes_are_a_miss_and_deleted(owners: Owners) -> None:
    tier = owners.tier()
    tier.put(key(1), chunk(1), LAYOUT)
    with open(files.path_of(owners.path, key(1)), "r+b") as file:  # as a bad disk would have them
        file.seek(1000)
        file.write(bytes([chunk(1)[1000 - 128].item() ^ 1]))
    assert tier.contains([key(1)]) == [True]
    assert not is_here(tier, 1)
    assert tier.contains([key(1)]) == [False]


def test_chunks_of_any_size_and_many_keys(owners: Owners) -> None:
    tier = owners.tier()
    for number, size in enumerate([1, 4095, 3 * MIB, 32 * MIB, 100]):
        assert tier.put(key(number), chunk(number, size), LAYOUT)
        assert is_here(tier, number, size)
    flags = tier.contains([key(number) for number in range(40_000)])
    assert [at for at, flag in enumerate(flags) if flag] == [0, 1, 2, 3, 4]


def test_every_record_is_listed(owners: Owners) -> None:
    tier = owners.tier()
    for number in range(600):
        tier.put(key(number), chunk(number, 64), LAYOUT)
    assert [row.key for row in tier.rows()] == [key(number) for number in range(600)]


def test_a_fresh_process_hits(owners: Owners) -> None:
    """The engine ended, and the owner; another process reads what they wrote."""
    tier = owners.tier()
    tier.put(key(1), chunk(1), LAYOUT)
    tier.close()
    owners.kill(signal.SIGTERM)
    code = (
        "import sys; from tests.test_tier_rocksdb import *\n"
        "tier = RocksTier(sys.argv[1], capacity_bytes=256 * MIB, deadline_s=DEADLINE_S)\n"
        "print(is_here(tier, 1), tier.state().pid)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(owners.path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    hit, pid = ran.stdout.split()
    owners.pids.add(int(pid))
    assert hit == "True"


def test_a_killed_owner_is_an_error_once_and_then_there_again(owners: Owners) -> None:
    tier = owners.tier()
    tier.put(key(1), chunk(1), LAYOUT)
    assert tier.sync()
    owners.kill()
    assert is_here(tier, 1), "a read needs no owner"
    with pytest.raises(ConnectionError):
        tier.contains([key(1)])
    assert tier.contains([key(1)]) == [True]
    owners.pids.add(tier.state().pid)


def test_a_stopped_owner_costs_no_more_than_the_deadline(owners: Owners) -> None:
    """A read needs no owner; what does returns by its deadline, and the owner is used again when it runs."""
    tier = owners.tier(deadline_s=DEADLINE_S)
    tier.put(key(1), chunk(1), LAYOUT)
    hasty = RocksTier(owners.path, capacity_bytes=256 * MIB, deadline_s=0.05)
    owners.tiers.append(hasty)
    (pid,) = owners.pids
    os.kill(pid, signal.SIGSTOP)
    assert is_here(hasty, 1)
    for _ in range(2):
        with pytest.raises((TimeoutError, Unavailable)):
            hasty.put(key(2), chunk(2), LAYOUT)
    os.kill(pid, signal.SIGCONT)
    assert tier.contains([key(1), key(2)]) == [True, False]


def test_an_engine_that_dies_in_mid_write_leaves_nothing(owners: Owners) -> None:
    tier = owners.tier()
    deadline_s = time.monotonic() + DEADLINE_S
    link = tier._take(deadline_s)
    reply = link.ask(Put(key(1), SIZE), deadline_s)
    assert isinstance(reply, Write)
    draft = Path(files.draft_path(owners.path, reply.name))
    draft.write_bytes(b"half of")
    link.close()
    eventually(lambda: not draft.exists(), "what it had begun is removed")
    assert tier.contains([key(1)]) == [False]


def test_the_owner_hears_of_reads(owners: Owners) -> None:
    """So that what is read stays when others have to go."""
    tier = owners.tier(capacity_bytes=4 * MIB)
    for number in range(3):
        tier.put(key(number), chunk(number, MIB), LAYOUT)
    assert is_here(tier, 0, MIB)
    tier.put(key(3), chunk(3, MIB), LAYOUT)
    assert tier.contains([key(number) for number in range(4)]) == [True, False, True, True]


def test_an_owner_that_nobody_wants_ends(tmp_path: Path) -> None:
    (tmp_path / "tier").mkdir(mode=0o700)
    command = [sys.executable, "-m", "vcache.tiers.rocksdb.owner", str(tmp_path / "tier")]
    arguments = [f"--capacity-bytes={MIB}", "--idle-s=0.1"]
    assert subprocess.run([*command, *arguments], timeout=DEADLINE_S, check=False).returncode == 0


def test_a_second_owner_leaves_the_first_alone(owners: Owners) -> None:
    tier = owners.tier()
    tier.put(key(1), chunk(1), LAYOUT)
    command = [sys.executable, "-m", "vcache.tiers.rocksdb.owner", str(owners.path)]
    done = subprocess.run([*command, f"--capacity-bytes={MIB}"], timeout=DEADLINE_S, check=False)
    assert done.returncode == 0
    assert is_here(tier, 1)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="capacity_bytes: got 5"):
        RocksTier(tmp_path / "a", capacity_bytes=5)
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    with pytest.raises(ConfigError, match=r"tiers.rocksdb.directory: .*mode 755, wanted .* mode 700"):
        RocksTier(shared, capacity_bytes=MIB)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match=r"tiers\.rocksdb\.directory"):
        RocksTier(file, capacity_bytes=MIB)


def test_a_closed_tier_leaks_nothing_and_refuses(owners: Owners) -> None:
    owners.tier()
    before = descriptors()
    tier = owners.tier()
    tier.put(key(1), chunk(1), LAYOUT)
    tier.close()
    tier.close()
    assert descriptors() == before
    with pytest.raises(EngineClosed, match="rocksdb"):
        tier.contains([key(1)])


def test_a_deep_directory_has_an_owner_too(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(12):
        deep /= "a-rather-long-name-of-a-directory"
    made = Owners(deep)
    try:
        tier = made.tier()
        assert tier.put(key(1), chunk(1), LAYOUT)
        assert is_here(tier, 1)
    finally:
        made.close()


def mounted(path: Path, size: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "none", str(path)]
    return os.geteuid() == 0 and not subprocess.run(command, capture_output=True, check=False).returncode


def test_a_disk_that_is_really_full_is_a_miss_and_a_counter(tmp_path: Path) -> None:
    """A tmpfs of 48 MiB: filled by somebody else, then by us; what is there is served, and room helps."""
    if not mounted(tmp_path, "48m"):
        pytest.skip("mounting a tmpfs needs root")
    made = Owners(tmp_path / "tier")
    try:
        tier = made.tier(capacity_bytes=1 << 30)
        assert tier.put(key(0), chunk(0, MIB), LAYOUT)
        assert tier.sync()
        (tmp_path / "other").write_bytes(b"x" * (24 * MIB))
        kept = [number for number in range(1, 60) if tier.put(key(number), chunk(number, MIB), LAYOUT)]
        assert 0 < len(kept) < 59
        state = tier.state()
        assert state.counters["full"] + state.counters["failed"] > 0
        assert is_here(tier, 0, MIB)
        # An owner that begins then has no room for an index.
        made.kill()
        with (tmp_path / "rest").open("wb", buffering=0) as rest, suppress(OSError):
            while rest.write(bytes(4096)):
                continue
        tier = made.tier(capacity_bytes=1 << 30)
        assert all(tier.contains([key(number) for number in (0, *kept)]))
        assert is_here(tier, kept[-1], MIB) and not tier.put(key(100), chunk(100), LAYOUT)
        assert tier.remove([key(kept[0])]) == 1 and not is_here(tier, kept[0], MIB)
        (tmp_path / "rest").unlink()
        (tmp_path / "other").unlink()
        assert tier.put(key(99), chunk(99, MIB), LAYOUT)
        assert is_here(tier, 99, MIB)
        assert tier.sync()
    finally:
        made.close()
        unmount = ["umount", str(tmp_path)]  # not at once: the owner's other threads may still be ending
        eventually(lambda: not subprocess.run(unmount, check=False).returncode, "the tmpfs is let go")
