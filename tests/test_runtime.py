"""The runtime directory: where it is, and who is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vcache.errors import ConfigError
from vcache.runtime import RuntimeDir

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def test_it_is_made_private_and_names_what_lies_in_it(runtime_dir: Path) -> None:
    found = RuntimeDir.resolve(str(runtime_dir / "pool"))
    assert found.path == runtime_dir / "pool"
    assert found.path.stat().st_mode & 0o777 == 0o700
    assert found.sessions_dir.stat().st_mode & 0o777 == 0o700
    assert found.rpc_endpoint == f"ipc://{found.path}/rpc.sock"
    names = {
        found.rpc_path,
        found.session_path,
        found.table_path,
        found.lock_path,
        found.autostart_lock_path,
        found.log_path,
        found.sessions_dir,
        found.session_lock_path(1),
    }
    assert len(names) == 8
    assert found.session_lock_path(2**64 - 1).name == "ffffffffffffffff.lock"
    assert found.file_mode == 0o600
    assert RuntimeDir.resolve(str(found.path)) == found


def test_the_default_is_in_the_users_own_runtime_directory(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_dir))
    assert RuntimeDir.resolve().path == runtime_dir / "vcache"


@pytest.mark.parametrize("value", ["", "relative", "/nowhere/at/all"])
def test_a_useless_xdg_runtime_dir_is_left_out(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    found = RuntimeDir.resolve()
    assert found.path == Path(f"/dev/shm/vcache-{os.geteuid()}")
    assert found.on_tmpfs


def test_a_path_too_long_for_a_socket_is_refused(runtime_dir: Path) -> None:
    longest = 107 - len("/session.sock") - len(str(runtime_dir)) - 1
    RuntimeDir.resolve(str(runtime_dir / ("x" * longest)))
    with pytest.raises(ConfigError, match=r"wanted at most 94 bytes"):
        RuntimeDir.resolve(str(runtime_dir / ("x" * (longest + 1))))


def test_a_link_is_refused(runtime_dir: Path) -> None:
    (runtime_dir / "real").mkdir(mode=0o700)
    (runtime_dir / "link").symlink_to(runtime_dir / "real")
    with pytest.raises(ConfigError, match="symbolic link"):
        RuntimeDir.resolve(str(runtime_dir / "link"))


def test_a_file_is_refused(runtime_dir: Path) -> None:
    (runtime_dir / "file").touch(mode=0o600)
    with pytest.raises(ConfigError, match="not a directory"):
        RuntimeDir.resolve(str(runtime_dir / "file"))


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_one_that_others_may_enter_is_refused(runtime_dir: Path, mode: int) -> None:
    (runtime_dir / "open").mkdir()
    (runtime_dir / "open").chmod(mode)
    with pytest.raises(ConfigError, match=f"has mode {mode:o}, wanted 700"):
        RuntimeDir.resolve(str(runtime_dir / "open"))


def test_one_in_a_place_that_is_not_there_is_refused(runtime_dir: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be made: No such file"):
        RuntimeDir.resolve(str(runtime_dir / "a" / "b"))


@needs_root
def test_somebody_elses_is_refused(runtime_dir: Path) -> None:
    (runtime_dir / "theirs").mkdir(mode=0o700)
    os.chown(runtime_dir / "theirs", 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345, wanted 0"):
        RuntimeDir.resolve(str(runtime_dir / "theirs"))


def test_a_group_may_share_it_but_nobody_else(runtime_dir: Path) -> None:
    group = str(os.getegid())
    found = RuntimeDir.resolve(str(runtime_dir / "shared"), group=group)
    assert found.path.stat().st_mode & 0o7777 == 0o2770
    assert found.sessions_dir.stat().st_mode & 0o7777 == 0o2770
    assert found.file_mode == 0o660
    assert RuntimeDir.resolve(str(found.path), group=group) == found
    with pytest.raises(ConfigError, match="has mode 770, wanted 700"):
        RuntimeDir.resolve(str(found.path))
    found.path.chmod(0o777)
    with pytest.raises(ConfigError, match="wanted 770"):
        RuntimeDir.resolve(str(found.path), group=group)


@needs_root
def test_a_directory_of_another_group_is_refused(runtime_dir: Path) -> None:
    RuntimeDir.resolve(str(runtime_dir / "shared"), group="54321")
    with pytest.raises(ConfigError, match="belongs to group 54321, wanted 54322"):
        RuntimeDir.resolve(str(runtime_dir / "shared"), group="54322")


def test_a_group_that_there_is_not_is_refused(runtime_dir: Path) -> None:
    with pytest.raises(ConfigError, match="got 'no-such-group', wanted the name or number"):
        RuntimeDir.resolve(str(runtime_dir / "shared"), group="no-such-group")


def test_it_says_whether_it_is_in_memory() -> None:
    assert RuntimeDir(Path("/dev/shm")).on_tmpfs
    assert not RuntimeDir(Path("/proc")).on_tmpfs
