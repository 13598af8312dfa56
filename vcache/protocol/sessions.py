"""What is said over the session socket, some of it with descriptors (SCM_RIGHTS)."""

from __future__ import annotations

from typing import TypeAlias

from vcache.protocol.base import Message


class Hello(Message, frozen=True):
    """First message of a connection; one descriptor: a pidfd of the sender, who holds the session's lock.

    session: random, chosen by the client, kept when it comes back to a restarted server.
    lineage: of the table that it knows (0: none).
    """

    version: int
    session: int
    lineage: int
    name: str


class Attach(Message, frozen=True):
    """Lend a segment to the pool; descriptor: its own description, with its memfd where it has one.

    numa: the NUMA node that it is on or near; -1: unknown.
    """

    seq: int
    descriptor: bytes
    segment_id: bytes
    incarnation: int
    device: str
    size: int
    data_offset: int
    rank: int = 0
    numa: int = -1


class Detach(Message, frozen=True):
    """Take a segment back; answered with `Detached` when no importer maps it any more."""

    seq: int
    segment: int


class Open(Message, frozen=True):
    """Ask for a peer's segment; answered with `Opened` and its memfd where it has one."""

    seq: int
    segment: int


class Unmapped(Message, frozen=True):
    """The sender maps this segment no more (or does not, if it never did)."""

    segment: int


class Bye(Message, frozen=True):
    """The session ends; the sender has no copy running and touches no extent again."""


class Welcome(Message, frozen=True):
    """Answer to `Hello`; one descriptor: the extent table, read-only.

    resumed: what the session owned is still its own, to be declared now. Otherwise it owns nothing, and
    segments that it lent need new memory: writers of the old table may be asleep.
    """

    version: int
    epoch: int
    lineage: int
    token: bytes
    resumed: bool
    pid: int


class Attached(Message, frozen=True):
    """The segment's number, never used twice in one lineage."""

    seq: int
    segment: int


class Detached(Message, frozen=True):
    """No importer maps the segment any more: its memory may be freed."""

    seq: int
    segment: int


class Opened(Message, frozen=True):
    """A peer's segment: to be verified against its own header when mapped."""

    seq: int
    segment: int
    descriptor: bytes


class Gone(Message, frozen=True):
    """Notice: this segment's incarnation has ended; unmap it and answer `Unmapped` when no copy runs."""

    segment: int


class Offering(Message, frozen=True):
    """Notice: there are chunks for this session to copy; it asks for them with `Offers`."""


class Refused(Message, frozen=True):
    """Answer to a session message that the server does not grant (seq 0: the connection itself)."""

    seq: int
    code: str
    message: str


class Ended(Message, frozen=True):
    """Answer to `Bye`, and the last message: the server knows nothing of the session any more."""


FromClient: TypeAlias = Hello | Attach | Detach | Open | Unmapped | Bye
FromServer: TypeAlias = Welcome | Attached | Detached | Opened | Gone | Offering | Refused | Ended
