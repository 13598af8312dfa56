"""What engines and the owner of a database say to each other, one message a packet.

Keys do not travel: they lie in the staging memory of the connection, one request at a time. Nor do records:
engines read and write the files themselves.
"""

from __future__ import annotations

from typing import Final

import msgspec

PROTOCOL: Final = 5
"""Changes with any message; an owner of another protocol is waited for until it ends."""


class Hello(msgspec.Struct, tag="hello", frozen=True, forbid_unknown_fields=True):
    """First; with the descriptor of the staging memory. The newest settings are those that count.

    capacity_bytes: 0 from who only looks: then the settings stay as they are.
    """

    protocol: int
    staging_bytes: int
    capacity_bytes: int
    ttl_s: float


class Contains(msgspec.Struct, tag="contains", frozen=True, forbid_unknown_fields=True):
    """`count` keys are staged; as many bytes come back there, 1 for those that are here."""

    count: int


class Used(msgspec.Struct, tag="used", frozen=True, forbid_unknown_fields=True):
    """Records that were read, in this order. Not answered."""

    keys: list[bytes]


class Put(msgspec.Struct, tag="put", frozen=True, forbid_unknown_fields=True):
    """A chunk of `length` bytes is to be kept; answered with `Write`, or `Done`: 1 if it is here already."""

    key: bytes
    length: int


class Written(msgspec.Struct, tag="written", frozen=True, forbid_unknown_fields=True):
    """The record is written, or could not be (done is False); answered with `Done`: 1 if it is here now."""

    done: bool


class Remove(msgspec.Struct, tag="remove", frozen=True, forbid_unknown_fields=True):
    """`count` keys are staged. damaged: because whoever read their records found them of no use."""

    count: int
    damaged: bool = False


class Clear(msgspec.Struct, tag="clear", frozen=True):
    """Forget all."""


class Sync(msgspec.Struct, tag="sync", frozen=True):
    """Have everything on the disk."""


class Rows(msgspec.Struct, tag="rows", frozen=True, forbid_unknown_fields=True):
    """Up to `limit` records behind the key `after`."""

    after: bytes
    limit: int


class Status(msgspec.Struct, tag="status", frozen=True):
    """How the owner is."""


class Done(msgspec.Struct, tag="done", frozen=True, forbid_unknown_fields=True):
    """It was done, to so many."""

    count: int


class Write(msgspec.Struct, tag="write", frozen=True, forbid_unknown_fields=True):
    """Write the record to the draft of this name, and say `Written`.

    No path: every engine has its own way to the directory.
    """

    name: str


class Refused(msgspec.Struct, tag="refused", frozen=True, forbid_unknown_fields=True):
    """No; why."""

    why: str


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One record, for people. Times in milliseconds since 1970; expires_ms 0: never."""

    key: bytes
    layout: bytes
    size: int
    created_ms: int
    expires_ms: int
    used_ms: int


class Listing(msgspec.Struct, tag="listing", frozen=True, forbid_unknown_fields=True):
    """Records in the order of their keys."""

    rows: list[Row]


class State(msgspec.Struct, tag="state", frozen=True, forbid_unknown_fields=True):
    """How the owner is: records, bytes, settings, counters, connections, its process."""

    pid: int
    records: int
    held_bytes: int
    capacity_bytes: int
    ttl_s: float
    connections: int
    counters: dict[str, int]


Request = Hello | Contains | Used | Put | Written | Remove | Clear | Sync | Rows | Status
Reply = Done | Write | Refused | Listing | State
