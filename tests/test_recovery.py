"""A killed server's successor: goes on with what the table says, whenever the kill came, or begins anew."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from metadata_server.directory import Directory, Policy
from metadata_server.recovery import restore
from tests.support.pool import BOOT, Pool, attach, handles, keys, namespace
from tests.support.torn import instants, leave, table_bytes
from vcache import protocol
from vcache.limits import KIB, MIB, SLABS_PER_SEGMENT
from vcache.protocol import Extents
from vcache.table import ExtentTable, State, TableDamaged

ROOM = 8


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    pool = Pool(tmp_path / "extents", capacity=64, segments=(ROOM * 4 * KIB,))
    yield pool
    if hasattr(pool, "directory"):
        pool.close()


def reopened(path: Path) -> tuple[ExtentTable, Directory]:
    table = ExtentTable.open(path, boot=BOOT)
    directory = restore(table, Policy())
    return table, directory


# --- what goes on -------------------------------------------------------------------------------------------


def test_chunks_layouts_and_namespaces_go_on(pool: Pool) -> None:
    pool.commit(1, pool.reserve(1, 1, 2, form=3), 1, 2, space=5)
    pool.store(1, 3, form=4)
    before = table_bytes(pool.table)
    pool.restart()
    assert table_bytes(pool.table) == before
    assert pool.there(1, 2, 3, form=3) == [1, 2]
    assert pool.there(1, 2, 3, form=4) == [3]
    assert pool.ask(1, protocol.Clear(namespace(5)), protocol.Done).count == 2
    assert pool.there(3, form=4) == [3]


def test_the_order_of_last_use_goes_on(pool: Pool) -> None:
    pool.store(1, *range(4))
    pool.store(1, *range(4, 8))
    pool.ask(1, protocol.Touch(keys(6, 1)), protocol.Done)
    pool.restart()
    order = []
    for _ in range(8):
        before = set(pool.there(*range(8)))
        pool.reserve(1, count=1)
        order += sorted(before - set(pool.there(*range(8))))
    assert order == [3, 2, 0, 7, 5, 4, 1, 6]


def test_times_to_live_go_on(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "ttl", segments=(MIB,), policy=Policy(default_ttl_ms=10_000))
    pool.store(1, 1)
    pool.commit(1, pool.reserve(1, 2), 2, ttl_ms=0)
    pool.restart()
    pool.wait_ms(9_000)
    assert pool.there(1, 2) == [1, 2]
    pool.wait_ms(2_000)
    assert pool.there(1, 2) == [2], "a second late at most"
    pool.close()


def test_a_chunk_that_expired_while_there_was_no_server_is_gone(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "ttl", segments=(MIB,), policy=Policy(default_ttl_ms=1_000))
    pool.store(1, 1)
    pool.now_ns += 5_000_000_000
    pool.restart()
    assert pool.there(1) == []
    pool.close()


def test_replicas_go_on(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "replicas", segments=(MIB, MIB))
    for near in (1, 2):
        pool.commit(1, pool.reserve(1, count=1, near=near), 1, replica=True)
    pool.restart(1)
    assert [pool.acquire(2, 1, near=near)["segment"].tolist() for near in (1, 2)] == [[1], [2]]
    pool.close()


def test_generations_never_go_back(pool: Pool) -> None:
    grants: dict[int, int] = {}
    for _ in range(6):
        for each in pool.reserve(1, count=ROOM):
            assert int(each["generation"]) > grants.get(int(each["index"]), -1)
            grants[int(each["index"])] = int(each["generation"])
        pool.restart()
        pool.reserve(1, count=1, size=16 * KIB)
        pool.restart()


def test_slabs_are_found_again_whatever_was_cut(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "slabs", segments=(SLABS_PER_SEGMENT * 64 * KIB, MIB))
    for form, size in enumerate((4, 12, 20, 64, 8), start=1):
        pool.store(1, *range(form * 100, form * 100 + 30), size=size * KIB, form=form)
    pool.acquire(1, *range(100, 130, 3), pin=True, prefix=False)
    pool.store(1, *range(600, 640), size=32 * KIB, form=6)
    pool.remove(*range(200, 230, 2))
    used = pool.directory.gauges()["used_bytes"]
    chunks = dict(pool.directory.chunks)
    pool.restart(1)
    assert pool.directory.gauges()["used_bytes"] == used
    assert pool.directory.chunks == chunks
    share = SLABS_PER_SEGMENT * 64 * KIB // SLABS_PER_SEGMENT
    assert all(
        len(slab.indices) * slab.size <= max(share, slab.size)
        for slab in pool.directory.allocator.slabs.values()
    )
    pool.ask(1, protocol.Clear(), protocol.Done)
    pool.declare(1)
    assert pool.directory.gauges()["used_bytes"] == 0
    pool.close()


def test_segments_of_the_dead_are_dropped_by_the_caller_and_their_records_used_again(pool: Pool) -> None:
    pool.directory.add_segment(2, attach(2, ROOM * 4 * KIB))
    pool.store(1, *range(2 * ROOM))
    pool.restart(1)
    pool.directory.drop_segment(2)
    pool.check()
    assert len(pool.there(*range(2 * ROOM))) == ROOM
    assert pool.directory.add_segment(2, attach(3, ROOM * 4 * KIB)) == 3
    assert len(pool.reserve(2, count=ROOM, near=3)) == ROOM
    assert len(pool.table.in_use()) == 2 * ROOM


def test_100_000_chunks_are_read_in_a_second(tmp_path: Path) -> None:
    """The figure of the whole restart is `make bench`'s; this only keeps it from becoming quadratic."""
    pool = Pool(tmp_path / "large", capacity=1 << 17, segments=(100_000 * 4 * KIB,))
    pool.checks = False
    for first in range(0, 100_000, 10_000):
        pool.store(1, *range(first, first + 10_000))
    pool.close()
    began = time.process_time()
    table, directory = reopened(pool.path)
    took_s = time.process_time() - began
    assert len(directory.chunks) == 100_000
    assert took_s < 5
    del directory
    table.close()


# --- every torn point ---------------------------------------------------------------------------------------


class Torn:
    """A pool in use, the file at each instant of one more request, and what must hold after each."""

    def __init__(self, pool: Pool, path: Path) -> None:
        self.pool = pool
        self.path = path
        pool.checks = False
        self.others = pool.reserve(2, count=2, near=1)
        self.mine = pool.reserve(1, count=2, near=1)
        pool.store(1, *range(100, 140), near=1)
        pool.store(1, *range(200, 215), size=12 * KIB, near=2, form=2)
        self.pinned = pool.acquire(2, 100, 101, pin=True)
        self.pin = pool.rid
        pool.acquire(3, 102, pin=True)
        self.orphan_pin = pool.rid
        pool.remove(102)
        self.granted = {
            int(index): pool.table.generation(int(index)) for index in pool.table.in_use().tolist()
        }
        pool.directory.check()

    def during(self, work: Callable[[], object]) -> int:
        """Kill the server at each instant of `work`; the number of them."""
        contents = instants(self.pool.table, work)
        for content in contents:
            self._verify(leave(self.path, content))
        return len(contents)

    def _verify(self, path: Path) -> None:
        table, directory = reopened(path)
        directory.check()
        directory.await_sessions({1, 2, 3})
        directory.check()
        self._holds(table, directory, self.pinned)
        self._holds(table, directory, self.others)
        for index, generation in self.granted.items():
            assert table.generation(index) >= generation
        for number, index in directory.chunks.items():
            assert table.key(index) == number
        declared = protocol.Declare(1 << 32, handles(self.others), [self._right(self.pin, self.pinned)])
        directory.handle(2, 1 << 40, declared, 10**10)
        for session in (1, 3):
            directory.handle(session, 1 << 40, protocol.Declare(1 << 32, b"", []), 10**10)
        directory.check()
        self._holds(table, directory, self.pinned)
        self._holds(table, directory, self.others)
        states = {index: table.state(index) for index in table.in_use().tolist()}
        orphans = {index for index, state in states.items() if state is State.ORPHANED}
        assert orphans <= set(self.pinned["index"].tolist())
        reserved = {index for index, state in states.items() if state is State.RESERVED}
        assert reserved == set(self.others["index"].tolist())
        directory.end_session(2)
        directory.handle(1, 1 << 41, protocol.Clear(), 10**10)
        directory.check()
        assert directory.gauges()["used_bytes"] == 0
        del directory
        table.close()

    @staticmethod
    def _right(rid: int, extents: Extents) -> protocol.Right:
        return protocol.Right(rid, handles(extents))

    @staticmethod
    def _holds(table: ExtentTable, directory: Directory, extents: Extents) -> None:
        """Session 2's extents are what they were: same bytes, same generation, nobody else's."""
        for each in extents:
            index = int(each["index"])
            assert table.generation(index) == int(each["generation"])
            assert int(table.offset[index]) == int(each["offset"])
            state = table.state(index)
            if state is State.RESERVED:
                assert index in directory.rights.sessions[2].reservations
            else:
                assert directory.rights.held(index)


@pytest.fixture
def torn(tmp_path: Path) -> Iterator[Torn]:
    pool = Pool(tmp_path / "extents", capacity=160, segments=(SLABS_PER_SEGMENT * 4 * KIB, 24 * 4 * KIB))
    torn = Torn(pool, tmp_path / "left")
    yield torn
    pool.close()


WORK: dict[str, tuple[int, Callable[[Torn], object]]] = {
    "reserve": (4, lambda torn: torn.pool.reserve(1, count=2)),
    "reserve that evicts": (20, lambda torn: torn.pool.reserve(1, *range(500, 540))),
    "reserve of another size": (10, lambda torn: torn.pool.reserve(1, count=4, size=20 * KIB, form=3)),
    "commit": (4, lambda torn: torn.pool.commit(1, torn.mine, 300, 301)),
    "commit that loses": (1, lambda torn: torn.pool.commit(1, torn.mine[[0, 0]], 100, 100)),
    "abort": (2, lambda torn: torn.pool.abort(1, torn.mine)),
    "remove": (10, lambda torn: torn.pool.remove(*range(100, 240))),
    "clear": (10, lambda torn: torn.pool.ask(1, protocol.Clear(), protocol.Done)),
    "pin": (2, lambda torn: torn.pool.acquire(1, *range(100, 240), pin=True, prefix=False)),
    "release of an orphan": (2, lambda torn: torn.pool.release(3, torn.orphan_pin)),
    "declaration": (2, lambda torn: torn.pool.declare(1)),
    "death": (2, lambda torn: torn.pool.directory.end_session(3)),
    "new segment": (2, lambda torn: torn.pool.directory.add_segment(1, attach(3, 64 * KIB))),
    "use": (2, lambda torn: torn.pool.ask(1, protocol.Touch(keys(*range(100, 240))), protocol.Done)),
}


@pytest.mark.parametrize("name", WORK)
def test_a_kill_at_any_instant_of_a_request_leaves_a_pool_to_go_on_with(name: str, torn: Torn) -> None:
    at_least, work = WORK[name]
    assert torn.during(lambda: work(torn)) >= at_least


def test_a_kill_at_any_instant_of_a_segments_end_leaves_a_pool_to_go_on_with(torn: Torn) -> None:
    """The segment that has nothing of session 2's, with a pin and reservations of others in it."""
    theirs = {int(each["segment"]) for each in np.concatenate([torn.pinned, torn.others])}
    assert theirs == {1}
    torn.pool.reserve(3, count=2, near=2)
    assert len(torn.pool.acquire(3, *range(200, 215), pin=True, form=2)) == 15
    assert torn.during(lambda: torn.pool.directory.drop_segment(2)) > 10


def test_a_kill_at_any_instant_of_a_recovery_leaves_a_pool_to_go_on_with(torn: Torn, tmp_path: Path) -> None:
    """The table was left in the middle of a segment's end, with an orphan that only the dead had pinned."""
    torn.pool.reserve(3, count=2, near=2)
    contents = instants(torn.pool.table, lambda: torn.pool.directory.drop_segment(2))
    table = ExtentTable.open(leave(tmp_path / "middle", contents[1]), boot=BOOT)

    def recover() -> None:
        restore(table, Policy()).await_sessions({1, 2})

    for content in instants(table, recover):
        torn._verify(leave(torn.path, content))
    table.close()


# --- what is damaged is given up ----------------------------------------------------------------------------


def rewrite(pool: Pool, index: int, **fields: int) -> None:
    """Change a record under a check that fits."""
    for name, value in fields.items():
        pool.table.records[name][index] = value
    pool.table._store(index, pool.table.generation(index), pool.table.state(index))


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 8 * KIB},
        {"offset": 8 * KIB},
        {"offset": 0},
        {"offset": ROOM * 4 * KIB + 4 * KIB},
        {"size": 0},
        {"offset": 1 << 40},
        {"size": 1 << 40},
        {"size": (1 << 64) - 1},
    ],
    ids=str,
)
def test_extents_that_contradict_each_other_are_damage(fields: dict[str, int], pool: Pool) -> None:
    pool.store(1, *range(ROOM))
    rewrite(pool, int(pool.acquire(1, 3)["index"][0]), **fields)
    pool.close()
    table = ExtentTable.open(pool.path, boot=BOOT)
    with pytest.raises(TableDamaged) as damage:
        restore(table, Policy())
    table.close()
    assert str(damage.value)


def test_a_damaged_table_is_replaced_and_its_readers_fences_break(pool: Pool) -> None:
    extents = pool.store(1, *range(ROOM))
    reader = pool.reader()
    lineage = pool.table.lineage
    pool.close()
    pool.table = ExtentTable.create(pool.path, 64, boot=BOOT)
    pool.directory = Directory(pool.table, pool.policy)
    assert pool.table.lineage != lineage
    assert not reader.unchanged(extents["index"], extents["generation"]).any()
    assert pool.there(*range(ROOM)) == []
