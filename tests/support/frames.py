"""A pool behind request frames, as the server's loop asks it: no sockets, and a clock that we move."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from metadata_server.directory import Directory
from metadata_server.recovery import restore
from metadata_server.requests import Credentials, Requests
from tests.support.pool import Pool, handles, keys, layout, lengths, namespace
from vcache import protocol
from vcache.limits import KIB, TOKEN_BYTES
from vcache.protocol import EXTENT, Request

EPOCH = 77
ROOM = 8

_Reply = TypeVar("_Reply")


class Server:
    """A pool behind frames. Session 1 and 2 are there."""

    def __init__(self, path: Path) -> None:
        self.pool = Pool(path, segments=(ROOM * 4 * KIB,))
        self.rebuilt = 0
        self.ours = True
        self.ended = 0
        self.ours = True
        self.requests = Requests(
            self.pool.directory,
            EPOCH,
            statistics=lambda: protocol.Statistics({"x": 1.0}, [], [], {}),
            shutdown=self._shutdown,
            rebuild=self._rebuild,
            still_ours=lambda: self.ours,
        )
        self.tokens = {session: session.to_bytes(TOKEN_BYTES, "big") for session in (1, 2)}
        for session, token in self.tokens.items():
            self.requests.sessions[session] = Credentials(token)
            self.pool.directory.rights.of(session)

    def close(self) -> None:
        """Close the pool."""
        del self.requests
        self.pool.close()

    def _shutdown(self) -> None:
        self.ended += 1

    def _rebuild(self) -> Directory:
        self.rebuilt += 1
        self.pool.directory = restore(self.pool.table, self.pool.policy)
        self.pool.directory.await_sessions(self.tokens)
        return self.pool.directory

    def frame(self, request: Request, rid: int, session: int = 1) -> bytes:
        """The request as a session sends it."""
        return protocol.encode_request(
            request, rid=rid, session=session, token=self.tokens[session], epoch=self.requests.epoch
        )

    def send(self, *frames: bytes) -> bytes | None:
        """The answer to these frames, 20 us after the last ones; None where there is none."""
        self.pool.now_ns += 20_000
        answer = self.requests.answer(list(frames), self.pool.now_ns)
        self.pool.directory.check()
        return answer

    def ask(self, request: Request, rid: int, want: type[_Reply], session: int = 1) -> _Reply:
        """The reply to a request."""
        return self.read(self.send(self.frame(request, rid, session)), rid, want)

    def read(self, answer: bytes | None, rid: int, want: type[_Reply]) -> _Reply:
        """The reply in an answer, which has to be of this kind."""
        assert answer is not None
        decoded = protocol.decode_answer(answer)
        assert (decoded.version, decoded.rid) == (protocol.PROTOCOL_VERSION, rid)
        reply = protocol.decode_reply(decoded.body)
        assert isinstance(reply, want), reply
        return reply

    def refused(self, answer: bytes | None, rid: int, code: str) -> str:
        """The words of an answer, which has to be an error of this kind."""
        error = self.read(answer, rid, protocol.Error)
        assert error.code == code, error
        assert error.message
        return error.message

    def content(self) -> bytes:
        """All of the table."""
        return self.pool.table.records.tobytes()


def store(server: Server, *numbers: int, first_rid: int = 1) -> None:
    """Store chunks of 100 bytes; takes two rids."""
    reply = server.ask(protocol.Reserve(layout(1), 4 * KIB, keys(*numbers)), first_rid, protocol.Reserved)
    extents = protocol.unpack(reply.extents, EXTENT)
    sizes = lengths(*[100] * len(extents))
    commit = protocol.Commit(handles(extents), keys(*numbers), sizes, namespace(1))
    assert server.ask(commit, first_rid + 1, protocol.Committed).outcomes == bytes(len(extents))


def envelope(server: Server, **changed: object) -> bytes:
    fields = {
        "version": protocol.PROTOCOL_VERSION,
        "rid": 9,
        "session": 1,
        "token": server.tokens[1],
        "epoch": EPOCH,
        "body": msgspec.Raw(protocol.encode(protocol.Clear())),
    }
    return protocol.encode(list((fields | changed).values()))
