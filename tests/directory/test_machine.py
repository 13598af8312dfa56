"""Whatever clients do, lose and die of, whenever the server is killed: bytes found are the bytes stored."""

from __future__ import annotations

import os
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from metadata_server.directory import Directory, Policy
from tests.support.machine.clients import LEASE_MS
from tests.support.machine.copying import Copying
from tests.support.machine.forgetting import Forgetting
from tests.support.machine.reading import Reading
from tests.support.machine.upheavals import Upheavals
from tests.support.machine.writing import Writing
from tests.support.pool import BOOT, MS
from vcache import protocol
from vcache.limits import KIB, MIB
from vcache.table import ExtentTable, State, TableReader

DICE = st.randoms(use_true_random=True)
"""Seeds, not choices of Hypothesis's own: a hundred times as many events in the same time."""

TRAFFIC = (
    *("store",) * 5,
    *("reserve", "commit", "acquire") * 4,
    *("read_under_a_lease", "release", "abort", "declare") * 2,
    *("something_late_arrives", "client_gives_up", "request_is_sent_again", "a_stopped_writer_wakes_up"),
    *("look_up", "touch", "remove"),
    *("ask_for_offers", "copy_ends") * 4,
    *("client_comes_back",) * 4,
)
UPHEAVALS = (
    *("server_is_killed", "time_passes") * 3,
    *("new_session", "session_dies", "add_segment", "add_segment", "drop_segment", "clear"),
)


class PoolMachine(Upheavals, Writing, Reading, Copying, Forgetting, RuleBasedStateMachine):
    """Clients of one pool. Each rule is some events; `booked` and the invariant say what is allowed."""

    eviction = "lru"

    @initialize(dice=DICE, small_quota=st.booleans())
    def start(self, dice: Random, small_quota: bool) -> None:
        self.policy = Policy(
            eviction=self.eviction,  # type: ignore[arg-type]
            default_ttl_ms=dice.choice((0, 0, 5_000)),
            lease_ms=LEASE_MS,
            pinned_bytes_max=300 * KIB if small_quota else 8 * MIB,
        )
        self.table = ExtentTable.create(self.path, dice.choice((90, 2048, 2048)), boot=BOOT)
        self.reader = TableReader(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        self._serve(Directory(self.table, self.policy))
        for _ in range(2):
            self._begin_session()
        self._add_segment(self.clients[1], MIB, 0)
        if dice.random() < 0.6:
            self._add_segment(self.clients[2], MIB, 1)
            self._send(self.clients[1], protocol.Offers(False, 16), "answered")
        if dice.random() < 0.5:
            self._store(self.clients[1], 1, 0, 60)

    @rule(dice=DICE, many=st.sampled_from((1, 3, 10, 30)))
    def traffic(self, dice: Random, many: int) -> None:
        self._happen(dice, TRAFFIC, many)

    @rule(dice=DICE, many=st.sampled_from((10, 30)))
    def more_traffic(self, dice: Random, many: int) -> None:
        """Hypothesis chooses among rules: so most of what happens is traffic."""
        self._happen(dice, TRAFFIC, many)

    @rule(dice=DICE)
    def upheaval(self, dice: Random) -> None:
        self._happen(dice, UPHEAVALS, 1)

    def _happen(self, dice: Random, events: tuple[str, ...], many: int) -> None:
        for _ in range(many):
            if self.clients:
                self.event = dice.choice(events)
                getattr(self, self.event)(dice)
                self.nothing_was_lost_or_changed()

    @invariant()
    def nothing_was_lost_or_changed(self) -> None:
        if not hasattr(self, "requests"):
            return
        self.directory.tick(self.now_ns)
        self.directory.check()
        self._learn_evictions(set())
        for client in self.clients.values():
            for place, stamp in client.reserved.values():
                assert self.memory.holds(place, stamp), "somebody wrote to a reservation"
            for chunk in client.pinned():
                assert self.memory.holds(chunk.place, chunk.stamp), "somebody wrote to a pinned chunk"

    def teardown(self) -> None:
        if not hasattr(self, "requests"):
            return
        try:
            self._leave_nothing()
        finally:
            del self.requests
            self.table.close()
            self.path.unlink()

    def _leave_nothing(self) -> None:
        for client in self.clients.values():
            if not client.connected:
                self._hello(client)
            client.under_way.clear()
            client.reserved.clear()
            client.pins.clear()
            self._declare(client)
        self.now_ns += LEASE_MS * MS
        self.directory.tick(self.now_ns)
        gauges = self.directory.gauges()
        assert (gauges["reservations"], gauges["pins"], gauges["leases"]) == (0, 0, 0)
        session = next(iter(self.clients), 1)
        self.directory.handle(session, 1 << 40, protocol.Clear(), self.now_ns)
        self.directory.check()
        assert self.directory.gauges()["used_bytes"] == 0, "something leaks"
        left = {self.table.state(index) for index in self.table.in_use().tolist()}
        assert left <= {State.FREE, State.EMPTY}


class S3FIFOPoolMachine(PoolMachine):
    """The same with the other policy."""

    eviction = "s3fifo"


TestPoolLRU = PoolMachine.TestCase
TestPoolS3FIFO = S3FIFOPoolMachine.TestCase
_EXAMPLES = settings.default.max_examples  # 100, and many more in the profile "explore"
TestPoolLRU.settings = settings(max_examples=_EXAMPLES // 4, stateful_step_count=20)
TestPoolS3FIFO.settings = settings(max_examples=_EXAMPLES // 8, stateful_step_count=20)
