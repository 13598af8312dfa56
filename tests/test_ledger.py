"""The ledger against a model of the server: messages arrive late, twice, in any order, or never."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vcache.client.ledger import Handle, Ledger
from vcache.errors import Unavailable
from vcache.protocol import HANDLE, Declare, Outcome, unpack

TENURE = 1 << 32


def named(declared: Declare) -> set[tuple[int, int]]:
    """The reservations that a declaration names."""
    return set(unpack(declared.reservations, HANDLE).tolist())


def pins_of(declared: Declare) -> dict[int, set[tuple[int, int]]]:
    """The pins that a declaration names."""
    return {right.rid: set(unpack(right.handles, HANDLE).tolist()) for right in declared.pins}


def test_outstanding_request_holds_settled_back() -> None:
    ledger = Ledger()
    line = ledger.resume(void=True)
    first, second = ledger.begin(line), ledger.begin(line)
    ledger.finish(second)
    assert ledger.declaration().settled == first - 1
    assert ledger.book_reservation(first, [(7, TENURE | 3)])
    declared = ledger.declaration()
    assert declared.settled == second
    assert named(declared) == {(7, 3)}


def test_late_answer_of_an_abandoned_reserve_is_not_booked() -> None:
    ledger = Ledger()
    line = ledger.resume(void=True)
    rid = ledger.begin(line)
    ledger.finish(rid)
    assert not ledger.book_reservation(rid, [(1, TENURE)])
    assert named(ledger.declaration()) == set()


def test_extents_of_an_outstanding_commit_are_still_declared() -> None:
    ledger = Ledger()
    line = ledger.resume(void=True)
    ledger.book_reservation(ledger.begin(line), [(1, TENURE), (2, TENURE)])
    commit = ledger.begin(line, ((1, TENURE), (2, TENURE)))
    assert named(ledger.declaration()) == {(1, 0), (2, 0)}
    assert ledger.book_commit(commit, [(1, TENURE)])
    assert named(ledger.declaration()) == {(2, 0)}, "the one that lost is still ours"


def test_abandoned_commit_gives_its_extents_up() -> None:
    ledger = Ledger()
    line = ledger.resume(void=True)
    ledger.book_reservation(ledger.begin(line), [(1, TENURE)])
    ledger.finish(ledger.begin(line, ((1, TENURE),)))
    assert named(ledger.declaration()) == set()


def test_lost_connection_ends_what_is_outstanding_and_what_would_begin() -> None:
    ledger = Ledger()
    line = ledger.resume(void=True)
    pin = ledger.begin(line)
    ledger.interrupt()
    assert not ledger.book_pin(pin, [(1, TENURE)])
    with pytest.raises(Unavailable):
        ledger.begin(line)
    assert ledger.begin(ledger.resume(void=False)) > pin
    with pytest.raises(Unavailable):
        ledger.begin(line)


def test_resumed_session_owns_what_it_owned_and_a_void_one_nothing() -> None:
    ledger = Ledger()
    line = ledger.resume(void=True)
    ledger.book_reservation(ledger.begin(line), [(1, TENURE)])
    pin = ledger.begin(line)
    ledger.book_pin(pin, [(2, TENURE), (3, TENURE)])
    ledger.interrupt()
    ledger.resume(void=False)
    assert named(ledger.declaration()) == {(1, 0)}
    assert pins_of(ledger.declaration()) == {pin: {(2, 0), (3, 0)}}
    ledger.interrupt()
    ledger.resume(void=True)
    assert ledger.declaration() == Declare(pin, b"", [])


def test_handle_of_an_earlier_tenure_is_not_taken_for_a_new_one() -> None:
    ledger = Ledger()
    line = ledger.resume(void=True)
    ledger.book_reservation(ledger.begin(line), [(1, 1 * TENURE)])
    ledger.interrupt()
    line = ledger.resume(void=True)
    ledger.book_reservation(ledger.begin(line), [(1, 2 * TENURE)])
    assert ledger.drop_reserved([(1, 1 * TENURE)]) == []
    ledger.finish(ledger.begin(line, ((1, 1 * TENURE),)))
    assert named(ledger.declaration()) == {(1, 0)}


def test_pin_is_released_in_parts() -> None:
    ledger = Ledger()
    pin = ledger.begin(ledger.resume(void=True))
    ledger.book_pin(pin, [(1, TENURE), (2, TENURE)])
    ledger.drop_pin(pin, [(1, TENURE), (1, TENURE), (9, TENURE)])
    assert pins_of(ledger.declaration()) == {pin: {(2, 0)}}
    ledger.drop_pin(pin)
    ledger.drop_pin(pin)
    assert pins_of(ledger.declaration()) == {}


@dataclass
class ServerModel:
    """Six extents, and the rules of reservations, commits and declarations; nothing else."""

    strict: bool = False
    generation: list[int] = field(default_factory=lambda: [0] * 6)
    reserved: dict[int, int] = field(default_factory=dict)
    committed: set[int] = field(default_factory=set)
    replies: dict[int, list[Handle]] = field(default_factory=dict)
    settled: int = 0

    def free(self, index: int) -> None:
        self.reserved.pop(index, None)
        self.committed.discard(index)
        self.generation[index] += 1

    def reserve(self, rid: int, count: int) -> list[Handle] | None:
        if rid in self.replies:
            return self.replies[rid]
        if self.strict and rid <= self.settled:
            return None
        there = [i for i in range(6) if i not in self.reserved and i not in self.committed][:count]
        for index in there:
            self.reserved[index] = rid
        self.replies[rid] = [(index, TENURE | self.generation[index]) for index in there]
        return self.replies[rid]

    def commit(self, handles: tuple[Handle, ...]) -> list[int]:
        outcomes = []
        for index, stamp in handles:
            ours = index in self.reserved and self.generation[index] == stamp & 0xFFFF_FFFF
            outcomes.append(Outcome.COMMITTED if ours else Outcome.STALE)
            if ours:
                del self.reserved[index]
                self.committed.add(index)
        return outcomes

    def declare(self, declared: Declare) -> None:
        keep = {index for index, gen in named(declared) if self.generation[index] == gen}
        for index in [i for i, rid in self.reserved.items() if rid <= declared.settled and i not in keep]:
            self.free(index)
        self.settled = max(self.settled, declared.settled)


class LedgerMachine(RuleBasedStateMachine):
    """Two threads' worth of requests; requests and answers wait in flight as long as the machine likes."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.line = self.ledger.resume(void=True)
        self.server = ServerModel()
        self.asked: list[tuple[int, int]] = []
        self.answers: list[tuple[int, list[Handle]]] = []
        self.commits: list[tuple[int, tuple[Handle, ...]]] = []
        self.outcomes: list[tuple[int, tuple[Handle, ...], list[int]]] = []
        self.declarations: list[Declare] = []
        self.writable: set[Handle] = set()

    @rule()
    def be_strict(self) -> None:
        self.server.strict = True

    @rule(count=st.integers(1, 3))
    def ask_reserve(self, count: int) -> None:
        self.asked.append((self.ledger.begin(self.line), count))

    @rule(at=st.integers(0, 9), keep=st.booleans())
    def reserve_arrives(self, at: int, keep: bool) -> None:
        if self.asked:
            rid, count = self.asked[at % len(self.asked)] if keep else self.asked.pop(at % len(self.asked))
            granted = self.server.reserve(rid, count)
            if granted is not None:
                self.answers.append((rid, granted))

    @rule(at=st.integers(0, 9))
    def answer_arrives(self, at: int) -> None:
        if self.answers:
            rid, granted = self.answers.pop(at % len(self.answers))
            if self.ledger.book_reservation(rid, granted):
                self.writable |= set(granted)

    @rule(at=st.integers(0, 9))
    def give_a_reserve_up(self, at: int) -> None:
        if self.asked:
            self.ledger.finish(self.asked[at % len(self.asked)][0])

    @rule(count=st.integers(1, 3))
    def ask_commit(self, count: int) -> None:
        handles = tuple(sorted(self.writable)[:count])
        if handles:
            self.writable -= set(handles)
            self.commits.append((self.ledger.begin(self.line, handles), handles))

    @rule(at=st.integers(0, 9))
    def commit_arrives(self, at: int) -> None:
        if self.commits:
            rid, handles = self.commits.pop(at % len(self.commits))
            self.outcomes.append((rid, handles, self.server.commit(handles)))

    @rule(at=st.integers(0, 9), lost=st.booleans())
    def outcome_arrives(self, at: int, lost: bool) -> None:
        if self.outcomes:
            rid, handles, outcomes = self.outcomes.pop(at % len(self.outcomes))
            if lost:
                self.ledger.finish(rid)
            elif self.ledger.book_commit(rid, handles):
                assert outcomes == [Outcome.COMMITTED] * len(handles), "what was ours was freed under us"

    @rule(count=st.integers(1, 3))
    def abort(self, count: int) -> None:
        handles = sorted(self.writable)[:count]
        self.writable -= set(handles)
        assert self.ledger.drop_reserved(handles) == handles

    @rule()
    def declare(self) -> None:
        self.declarations.append(self.ledger.declaration())

    @rule(at=st.integers(0, 9))
    def declaration_arrives(self, at: int) -> None:
        if self.declarations:
            self.server.declare(self.declarations.pop(at % len(self.declarations)))

    @rule(index=st.integers(0, 5))
    def evict(self, index: int) -> None:
        if index in self.server.committed:
            self.server.free(index)

    @rule()
    def reconnect(self) -> None:
        """Answers that were under way are lost with the connection; requests may still arrive."""
        self.ledger.interrupt()
        self.line = self.ledger.resume(void=False)
        self.server.declare(self.ledger.declaration())

    @invariant()
    def nothing_that_may_be_written_was_freed(self) -> None:
        for index, stamp in self.writable:
            assert index in self.server.reserved
            assert self.server.generation[index] == stamp & 0xFFFF_FFFF

    def teardown(self) -> None:
        """In the end nothing leaks: the server holds exactly what may be written."""
        while self.asked:
            self.reserve_arrives(0, False)
        while self.commits:
            self.commit_arrives(0)
        self.ledger.interrupt()
        self.ledger.resume(void=False)
        self.server.declare(self.ledger.declaration())
        held = {(index, TENURE | self.server.generation[index]) for index in self.server.reserved}
        assert held == self.writable


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase
