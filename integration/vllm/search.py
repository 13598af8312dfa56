"""Finding a prefix in the pool and pinning it. Whoever asks waits himself for as long as he likes, since a
thread's turn can cost as much time as the question; for what takes longer a thread waits.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from integration.vllm.groups import Groups
from integration.vllm.hits import first_needed, longest_hit
from integration.vllm.keys import ChunkKeys
from integration.vllm.messages import Place
from integration.vllm.pools import started
from integration.vllm.releases import Releases
from vcache.client import Acquiring, Client, Grant
from vcache.engine.stats import Cause, Counters
from vcache.errors import LocalStateError, ServerError, Unavailable
from vcache.limits import KEYS_PER_REQUEST_MAX
from vcache.protocol import Extents

_log = logging.getLogger("vcache.integration.vllm")

_SEARCH_THREADS = 2


@dataclass(frozen=True)
class Wanted:
    """Chunks `first` … `end` - 1 of a sequence with these block hashes."""

    hashes: tuple[bytes, ...]
    first: int
    end: int
    adapter: str


@dataclass(frozen=True)
class _Slot:
    """Where in what was asked a group's chunks of one rank stand: from `begin` on, one per wanted chunk."""

    fingerprint: bytes
    group: int
    place: Place
    begin: int


class Hit:
    """Chunks `first` … `end` - 1 are there on all ranks, and pinned until `release`; none if they are equal.

    lineage: of the pool that granted them.
    """

    def __init__(self, first: int, end: int, found: dict[tuple[Place, int], Extents], lineage: int) -> None:
        self.first = first
        self.end = end
        self.lineage = lineage
        self._found = found

    def chunks(self, place: Place, group: int) -> list[int]:
        """The chunks of a group that are held: the last ones, for a window needs no others."""
        count = len(self._found[place, group])
        return list(range(self.end - count, self.end))

    def extents(self, place: Place, group: int, chunks: Sequence[int]) -> bytes:
        """Where these chunks lie, packed."""
        held = self._found[place, group]
        return held[[chunk - self.end + len(held) for chunk in chunks]].tobytes()


class Pinned:
    """A hit and the pins that hold it. `release` may be called again."""

    def __init__(self, searches: Searches, hit: Hit, grants: list[Grant]) -> None:
        self.hit = hit
        self._searches = searches
        self._grants = grants

    def release(self) -> None:
        """Nobody reads it any more. Never fails and never waits."""
        grants, self._grants = self._grants, []
        if grants:
            self._searches.give_back(grants)


class _Question:
    """What a search asks the pool, one request for each layout, and what it is granted."""

    def __init__(self) -> None:
        self.has_begun = False
        self.slots: list[_Slot] = []
        self.found: dict[bytes, tuple[Grant, list[bool]]] = {}
        self._asked: dict[bytes, list[bytes]] = {}
        self._open: dict[bytes, Acquiring] = {}

    def begin(self, client: Client, slots: list[_Slot], asked: dict[bytes, list[bytes]]) -> None:
        """Ask. Raises as `Client.acquire`."""
        self.has_begun, self.slots, self._asked = True, slots, asked
        for fingerprint, keys in asked.items():
            self._open[fingerprint] = client.begin_acquire(keys, layout=fingerprint, pin=True, prefix=False)

    def wait(self, within_s: float) -> bool:
        """Whether all is answered by then. Raises as `Client.acquire`."""
        until_s = time.monotonic() + within_s
        while self._open:
            fingerprint, acquiring = self._open.popitem()
            grant = acquiring.result(max(0.0, until_s - time.monotonic()))
            if grant is None:
                self._open[fingerprint] = acquiring
                return False
            self.found[fingerprint] = grant, grant.flags or [False] * len(self._asked[fingerprint])
        return True

    def give_up(self) -> list[Grant]:
        """Wait for nothing any more; what was granted, to be released."""
        for acquiring in self._open.values():
            acquiring.give_up()
        self._open.clear()
        return [grant for grant, _ in self.found.values()]


class Searches:
    """Asks the pool for prefixes. Whatever goes wrong there is a miss, counted."""

    def __init__(self, client: Client, groups: Groups, keys: ChunkKeys, counters: Counters) -> None:
        self._client = client
        self._groups = groups
        self._keys = keys
        self._counters = counters
        self._threads = started(ThreadPoolExecutor(_SEARCH_THREADS, "vcache-search"), _SEARCH_THREADS)
        self._releases = Releases(client)

    def begin(self, wanted: Wanted, within_s: float) -> Future[Pinned]:
        """Look for it, in this thread for up to `within_s`, then in another one; what the future gives has to
        be released.
        """
        question = _Question()
        # Without patience nothing is asked here: each question that is left open keeps a channel of its own.
        pinned = self._answer(wanted, question, within_s) if within_s > 0 else None
        if pinned is None:
            try:
                return self._threads.submit(self._finish, wanted, question)
            except RuntimeError:  # closed
                question.give_up()
                pinned = self.nothing(wanted.first)
        done: Future[Pinned] = Future()
        done.set_result(pinned)
        return done

    def nothing(self, first: int) -> Pinned:
        """A hit of no length."""
        return Pinned(self, Hit(first, first, {}, 0), [])

    def give_back(self, grants: list[Grant]) -> None:
        """Release these, some time soon."""
        self._releases.later(grants)

    def close(self) -> None:
        """Wait for what is under way."""
        self._threads.shutdown(wait=True)
        self._releases.close()

    def _finish(self, wanted: Wanted, question: _Question) -> Pinned:
        pinned = self._answer(wanted, question, math.inf)
        assert pinned is not None
        return pinned

    def _answer(self, wanted: Wanted, question: _Question, within_s: float) -> Pinned | None:
        """What is there, pinned; None if it is not known after `within_s`, and may be asked again."""
        try:
            return self._longest(wanted, question) if self._is_answered(wanted, question, within_s) else None
        except Unavailable as error:
            self._counters.failed(Cause.NO_SERVER, error)
        except ServerError as error:
            self._counters.failed(Cause.REFUSED, error)
        except LocalStateError as error:
            _log.debug("search ended: %s", error)
            question.give_up()
            return self.nothing(wanted.first)
        except Exception as error:  # of ours: a miss for vLLM
            _log.exception("a search failed")
            self._counters.failed(Cause.MALFORMED, repr(error))
        except BaseException:  # an interrupt
            self.give_back(question.give_up())
            raise
        self.give_back(question.give_up())
        return self.nothing(wanted.first)

    def _is_answered(self, wanted: Wanted, question: _Question, within_s: float) -> bool:
        if not question.has_begun:
            question.begin(self._client, *self._questions(wanted))
        return question.wait(within_s)

    def _longest(self, wanted: Wanted, question: _Question) -> Pinned:
        """The longest hit; what is not part of it is given back."""
        count = wanted.end - wanted.first
        there = [[True] * count for _ in self._groups.groups]
        for slot in question.slots:
            flags = question.found[slot.fingerprint][1][slot.begin : slot.begin + count]
            there[slot.group] = [a and b for a, b in zip(there[slot.group], flags, strict=True)]
        windows = [group.window_tokens for group in self._groups.groups]
        tokens = self._groups.chunk_tokens
        return self._keep(
            wanted, longest_hit(there, windows, first=wanted.first, chunk_tokens=tokens), question
        )

    def _questions(self, wanted: Wanted) -> tuple[list[_Slot], dict[bytes, list[bytes]]]:
        chunks = range(wanted.first, wanted.end)
        slots: list[_Slot] = []
        asked: dict[bytes, list[bytes]] = {}
        for place, identity in self._keys.identities.items():
            for group in range(len(self._groups)):
                fingerprint = identity.fingerprints[group]
                keys = asked.setdefault(fingerprint, [])
                slots.append(_Slot(fingerprint, group, place, len(keys)))
                keys += self._keys.keys(wanted.hashes, chunks, group, place, wanted.adapter)
        return slots, asked

    def _keep(
        self,
        wanted: Wanted,
        end: int,
        question: _Question,
    ) -> Pinned:
        found, grants = question.found, [grant for grant, _ in question.found.values()]
        held: dict[tuple[Place, int], Extents] = {}
        kept = {fingerprint: np.zeros(len(grant.extents), bool) for fingerprint, (grant, _) in found.items()}
        for slot in question.slots if end > wanted.first else ():
            grant, flags = found[slot.fingerprint]
            window = self._groups.groups[slot.group].window_tokens
            needed = first_needed(end, wanted.first, self._groups.chunk_tokens, window)
            rows = np.cumsum([0, *flags])[
                slot.begin + needed - wanted.first : slot.begin + end - wanted.first
            ]
            kept[slot.fingerprint][rows] = True
            held[slot.place, slot.group] = grant.extents[rows]
        for fingerprint, (grant, _) in found.items():
            unneeded = grant.extents[~kept[fingerprint]]
            if len(unneeded):
                self._client.release(grant, unneeded)
        lineage = grants[0].lineage
        if any(grant.lineage != lineage for grant in grants):  # the server began anew in between
            raise Unavailable("the metadata server's pool is a new one")
        return Pinned(self, Hit(wanted.first, end, held, lineage), grants if end > wanted.first else [])


def chunks_at_most(groups: Groups, places: int) -> int:
    """How many chunks one search may ask for, so that a question fits a request."""
    return KEYS_PER_REQUEST_MAX // max(1, len(groups) * places)
