"""A chunk that two threads read: right whoever reads which piece, and its memory is left alone afterwards."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.processes.worker import DEADLINE_S
from vcache.limits import RECORD_HEADER_BYTES, RECORD_PIECE_BYTES, TIER_HELP_REST_CHUNKS
from vcache.tiers.record import Flaw, Header, header_for
from vcache.tiers.rocksdb import files
from vcache.tiers.rocksdb.pieces import Helper, Pieces

KEY, LAYOUT = bytes(range(32)), b"L" * 16
CHUNK = os.urandom(3 * RECORD_PIECE_BYTES + 1000)
HEADER = header_for(KEY, LAYOUT, CHUNK, 1)


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = str(tmp_path / "record")
    files.write(path, HEADER, memoryview(CHUNK))
    return path


@pytest.fixture
def fd(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def yes() -> bool:
    return True


def truncate(path: str, size: int) -> None:
    os.truncate(path, RECORD_HEADER_BYTES + size)


def read(path: str, helper: Helper | None = None) -> Header | Flaw | None:
    into = bytearray(len(CHUNK))
    answer = files.read(path, KEY, LAYOUT, memoryview(into), helper)
    assert not isinstance(answer, Header) or into == CHUNK
    return answer


def test_a_file_is_the_header_and_the_chunk(path: str) -> None:
    assert Path(path).read_bytes() == HEADER.pack() + CHUNK
    assert read(path) == HEADER


@pytest.mark.parametrize("helps", range(6))
def test_it_is_the_same_chunk_whoever_reads_which_piece(fd: int, helps: int) -> None:
    into = bytearray(len(CHUNK))
    pieces = Pieces(fd, memoryview(into), time.perf_counter)
    welcome = iter([True] * helps + [False])
    pieces.help(lambda: next(welcome))
    assert len(pieces._left) == max(4 - helps, 0)
    assert pieces.read() == HEADER.checksum
    assert into == CHUNK
    pieces.end()


@pytest.mark.parametrize("size", [0, 1, RECORD_PIECE_BYTES, 3 * RECORD_PIECE_BYTES, len(CHUNK) - 1])
def test_a_file_that_ends_too_early_is_no_chunk(path: str, fd: int, size: int) -> None:
    truncate(path, size)
    pieces = Pieces(fd, memoryview(bytearray(len(CHUNK))), time.perf_counter)
    pieces.help(yes)
    assert pieces.read() is None
    pieces.end()
    assert read(path) is Flaw.CHUNK


def test_what_a_helper_cannot_read_is_met_by_who_wants_the_chunk(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    pieces = Pieces(folder, memoryview(bytearray(len(CHUNK))), time.perf_counter)
    pieces.help(yes)
    assert len(pieces._left) == 4
    with pytest.raises(IsADirectoryError):
        pieces.read()
    pieces.end()
    os.close(folder)


@pytest.mark.parametrize("at", [0, RECORD_PIECE_BYTES, 3 * RECORD_PIECE_BYTES - 1, len(CHUNK) - 1])
def test_damage_is_seen_in_every_piece(path: str, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(RECORD_HEADER_BYTES + at)
        file.write(bytes([CHUNK[at] ^ 1]))
    assert read(path) is Flaw.CHUNK


def test_pieces_that_changed_places_are_no_chunk(path: str) -> None:
    first, second = CHUNK[:RECORD_PIECE_BYTES], CHUNK[RECORD_PIECE_BYTES : 2 * RECORD_PIECE_BYTES]
    with open(path, "r+b") as file:
        file.seek(RECORD_HEADER_BYTES)
        file.write(second + first)
    assert read(path) is Flaw.CHUNK


def test_a_helper_that_comes_too_late_reads_nothing(fd: int) -> None:
    into = bytearray(len(CHUNK))
    pieces = Pieces(fd, memoryview(into), time.perf_counter)
    pieces.end()
    pieces.help(yes)
    assert into == bytes(len(CHUNK))


def test_the_end_waits_for_what_a_helper_does(fd: int) -> None:
    into = bytearray(len(CHUNK))
    pieces = Pieces(fd, memoryview(into), time.perf_counter)
    helping, go = threading.Event(), threading.Event()

    def is_welcome() -> bool:
        helping.set()
        return go.wait(DEADLINE_S)

    def end() -> bytes:
        pieces.end()
        return bytes(into)

    with ThreadPoolExecutor(2) as threads:
        threads.submit(pieces.help, is_welcome)
        assert helping.wait(DEADLINE_S)
        ended = threads.submit(end)
        assert not ended.done()
        go.set()
        assert ended.result(DEADLINE_S) == bytes(into)


def test_a_helper_is_asked_only_while_a_processor_is_idle(path: str) -> None:
    busy, idle = Helper(lambda: 0), Helper(lambda: 1)
    assert read(path, busy) == HEADER and busy._thread is None
    assert read(path, idle) == HEADER and idle._thread is not None
    for helper in (busy, idle):
        helper.close()
        helper.close()
    idle._thread.join(DEADLINE_S)
    assert not idle._thread.is_alive()
    assert read(path, idle) == HEADER


def test_a_helper_that_holds_up_who_reads_is_left_alone_for_a_while(path: str) -> None:
    helping, has_read = threading.Event(), threading.Event()
    seconds = iter([0.0, 1.0, 100.0])

    def idle() -> int:
        if threading.current_thread() is helper._thread:
            helping.set()
            assert has_read.wait(DEADLINE_S)
        return 1

    def clock() -> float:
        assert helping.wait(DEADLINE_S)
        now_s = next(seconds)
        if now_s == 1.0:
            has_read.set()
        return now_s

    helper = Helper(idle, clock)
    assert read(path, helper) == HEADER
    assert [helper.is_free() for _ in range(TIER_HELP_REST_CHUNKS)] == [False] * TIER_HELP_REST_CHUNKS
    assert read(path, Helper()) == HEADER
    helper.close()


def test_many_read_and_one_helps(path: str) -> None:
    helper = Helper(lambda: 1)
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda _: read(path, helper), range(200))) == {HEADER}
        truncate(path, len(CHUNK) - 1)
        assert set(threads.map(lambda _: read(path, helper), range(100))) == {Flaw.CHUNK}
    helper.close()


def test_a_helper_that_cannot_be_had_is_not_missed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert read(path, Helper(lambda: 1)) == HEADER
