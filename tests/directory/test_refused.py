"""The directory at its edges: what is wrong is refused and changes nothing, what is extreme is answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from metadata_server.directory import NS, Policy
from metadata_server.errors import Refusal
from tests.directory.conftest import ROOM
from tests.support.pool import Pool, handles, keys, layout, lengths, make, namespace
from vcache import limits, protocol
from vcache.errors import RemoteProtocolError
from vcache.limits import KIB, MIB
from vcache.protocol import ErrorCode, Extents, Outcome
from vcache.table import State

GOOD = {"handles": b"", "keys": b"", "lengths": b"", "namespace": namespace(1)}
REFUSED: dict[str, tuple[protocol.Request, str]] = {
    "no size": (protocol.Reserve(layout(1), 0, b"", 1), ErrorCode.ARGUMENT),
    "negative size": (protocol.Reserve(layout(1), -1, b"", 1), ErrorCode.ARGUMENT),
    "size beyond lengths": (
        protocol.Reserve(layout(1), limits.CHUNK_BYTES_MAX + 1, b"", 1),
        ErrorCode.ARGUMENT,
    ),
    "short layout": (protocol.Reserve(b"x", 4096, b"", 1), ErrorCode.ARGUMENT),
    "negative count": (protocol.Reserve(layout(1), 4096, b"", -1), ErrorCode.LIMIT),
    "too many": (
        protocol.Reserve(layout(1), 4096, b"", limits.RESERVATIONS_PER_SESSION_MAX + 1),
        ErrorCode.LIMIT,
    ),
    "commit without keys": (
        protocol.Commit(**(GOOD | {"handles": bytes(8)})),
        ErrorCode.ARGUMENT,
    ),
    "commit without namespace": (protocol.Commit(**(GOOD | {"namespace": b""})), ErrorCode.ARGUMENT),
    "ttl beyond the clock": (protocol.Commit(**GOOD, ttl_ms=1 << 60), ErrorCode.ARGUMENT),
    "pin twice": (protocol.Acquire(keys(1, 1), layout(1), pin=True), ErrorCode.ARGUMENT),
    "clear half a namespace": (protocol.Clear(b"xyz"), ErrorCode.ARGUMENT),
    "too many keys": (
        protocol.Lookup(bytes(32 * (limits.KEYS_PER_REQUEST_MAX + 1)), layout(1)),
        ErrorCode.LIMIT,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_and_changes_nothing(name: str, pool: Pool) -> None:
    pool.store(1, 1, 2)
    content = pool.table.records.tobytes()
    request, code = REFUSED[name]
    with pytest.raises(Refusal) as refusal:
        pool.ask(1, request, protocol.Done)
    assert refusal.value.code == code
    pool.check()
    assert pool.table.records.tobytes() == content


def test_a_commit_with_one_bad_length_changes_nothing(pool: Pool) -> None:
    extents = pool.reserve(1, count=3)
    for bad in (0, 4 * KIB + 1, 1 << 32, (1 << 64) - 1):
        ask = protocol.Commit(handles(extents), keys(1, 2, 3), lengths(10, bad, 10), namespace(1))
        with pytest.raises(Refusal, match=r"lengths\[1\]"):
            pool.ask(1, ask, protocol.Committed)
        assert pool.there(1, 2, 3) == []
    assert pool.abort(1, extents) == 3


HALF = [
    protocol.Lookup(b"x", layout(1)),
    protocol.Contains(bytes(33)),
    protocol.Acquire(bytes(31), layout(1)),
    protocol.Touch(b"x"),
    protocol.Remove(b"x"),
    protocol.Abort(b"x"),
    protocol.Release(1, bytes(9)),
    protocol.Reserve(layout(1), 4096, b"x"),
    protocol.Commit(b"x", b"", b"", namespace(1)),
    protocol.Commit(b"", b"", b"x", namespace(1)),
    protocol.Declare(0, b"x", []),
    protocol.Declare(0, b"", [protocol.Right(1, b"x")]),
]


@pytest.mark.parametrize("request_", HALF, ids=lambda each: type(each).__name__)
def test_half_a_record_is_malformed_and_changes_nothing(request_: protocol.Request, pool: Pool) -> None:
    pool.store(1, 1)
    pool.acquire(1, 1, pin=True)
    content = pool.table.records.tobytes()
    with pytest.raises(RemoteProtocolError):
        pool.ask(1, request_, protocol.Done)
    pool.check()
    assert pool.table.records.tobytes() == content


def test_the_largest_chunk_there_can_be_is_stored(tmp_path: Path) -> None:
    pool = make(tmp_path, 8 << 30)
    assert len(pool.store(1, 1, size=limits.CHUNK_BYTES_MAX)) == 1
    assert pool.acquire(1, 1)["length"].tolist() == [limits.CHUNK_BYTES_MAX]
    pool.close()


def test_a_full_table_grants_what_it_can(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "small", capacity=10, segments=(MIB,))
    assert len(pool.store(1, *range(20))) == 10
    assert len(pool.store(1, *range(20, 25), size=8 * KIB, form=2)) == 5
    assert pool.directory.gauges()["table_full"] > 0
    pool.close()


def test_the_clock_may_be_old(tmp_path: Path) -> None:
    """After 70 years of uptime lengths, uses and expiries still fit their fields."""
    pool = make(tmp_path, MIB, policy=Policy(default_ttl_ms=1_000))
    pool.now_ns = 70 * 365 * 86_400 * NS
    extents = pool.reserve(1, count=1)
    assert pool.commit(1, extents, 1, ttl_ms=limits.TTL_MS_MAX) == [Outcome.COMMITTED]
    assert pool.there(1) == [1]
    assert pool.table.state(int(extents["index"][0])) is State.COMMITTED
    pool.close()


def test_numbers_in_replies_are_those_of_the_table(pool: Pool) -> None:
    extents: Extents = pool.reserve(1, count=ROOM)
    for each in extents:
        index = int(each["index"])
        assert int(each["generation"]) == pool.table.generation(index)
        assert int(each["offset"]) == int(pool.table.offset[index])
        assert int(each["segment"]) == 1
    assert extents["reserved"].tolist() == [0] * ROOM
