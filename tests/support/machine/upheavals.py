"""Sessions and segments that come and go, a server that is killed, time that passes, late answers."""

from __future__ import annotations

from random import Random

from metadata_server.directory import NS
from metadata_server.recovery import restore
from metadata_server.requests import Credentials
from tests.support.machine.clients import LEASE_MS, Clients
from tests.support.model import Chunk, Client
from tests.support.pool import BOOT, MS, attach
from vcache import protocol
from vcache.limits import MIB, TOKEN_BYTES
from vcache.table import ExtentTable


class Upheavals(Clients):
    """What befalls clients and server."""

    # -- who there is

    def new_session(self, dice: Random) -> None:
        if len(self.clients) < 4:
            self._begin_session()

    def _begin_session(self) -> None:
        self.sessions += 1
        self.clients[self.sessions] = Client(self.sessions, self.sessions.to_bytes(TOKEN_BYTES, "big"))
        self._hello(self.clients[self.sessions])

    def _hello(self, client: Client) -> None:
        self.requests.sessions[client.session] = Credentials(client.token)
        self.directory.rights.of(client.session)
        client.connected = True

    def session_dies(self, dice: Random) -> None:
        if len(self.clients) > 1:
            self._die(dice.choice(sorted(self.clients)))

    def _die(self, session: int) -> None:
        del self.clients[session]
        self.requests.sessions.pop(session, None)
        self.directory.end_session(session)
        for number in [number for number, (lender, _) in self.lenders.items() if lender == session]:
            self._drop(number)

    def add_segment(self, dice: Random) -> None:
        client = self._clients(dice)
        if client is not None and len(self.segments) < 3:
            size = dice.choice((MIB // 2, MIB, 3 * MIB))
            self._add_segment(client, size, dice.choice((0, 0, 1)))

    def _add_segment(self, client: Client, size: int, rank: int) -> None:
        self.attached += 1
        asked = attach(self.attached, size, rank=rank)
        number = self.directory.add_segment(client.session, asked)
        assert number not in self.segments
        self.segments[number] = asked.size
        self.lenders[number] = client.session, asked
        self.memory.add(number, asked.size)

    def drop_segment(self, dice: Random) -> None:
        if self.segments:
            self._drop(dice.choice(sorted(self.segments)))

    def _drop(self, number: int) -> None:
        self.directory.drop_segment(number)
        del self.segments[number], self.lenders[number]
        for client in self.clients.values():
            client.forget_segment(number)
        for replicas in self.bound.values():
            for handle in [handle for handle, chunk in replicas.items() if chunk.place.segment == number]:
                del replicas[handle]

    # -- the server's end and its successor's beginning

    def server_is_killed(self, dice: Random) -> None:
        lives = (True, True, False)
        alive = {session for session in sorted(self.clients) if dice.choice(lives)}
        self.requests.directory = None  # type: ignore[assignment]
        self.table.close()
        self.epoch += 1
        self.table = ExtentTable.open(self.path, boot=BOOT)
        self._serve(restore(self.table, self.policy))
        self.directory.check()
        self.directory.await_sessions(alive)
        for session in set(self.clients) - alive:
            del self.clients[session]
            for number in [number for number, (lender, _) in self.lenders.items() if lender == session]:
                self._drop(number)
        for client in self.clients.values():
            client.connected = False
            client.settled = 0
            client.answered.clear()
            client.leases = {rid: (0, held) for rid, (_, held) in client.leases.items()}
            for late in client.under_way:
                late.given_up = True
        for replicas in self.bound.values():
            for handle, chunk in replicas.items():
                whole = -(-chunk.expiry_ns // NS) * NS
                replicas[handle] = Chunk(chunk.place, chunk.stamp, chunk.form, chunk.space, whole)

    def client_comes_back(self, dice: Random) -> None:
        away = [client for client in self.clients.values() if not client.connected]
        if not away:
            return
        client = dice.choice(away)
        client.token = (client.session << 64 | self.epoch).to_bytes(TOKEN_BYTES, "big")
        self._hello(client)
        for number, (lender, asked) in self.lenders.items():
            if lender == client.session:
                assert self.directory.add_segment(client.session, asked) == number
        if dice.random() < 0.5:
            self._declare(client)

    def declare(self, dice: Random) -> None:
        client = self._clients(dice)
        if client is not None:
            self._declare(client)

    def _declare(self, client: Client) -> None:
        held = dict(client.reserved)
        for late in client.under_way:
            if not late.given_up:
                held |= late.hanging
        ask = protocol.Declare(
            client.truth(),
            protocol.pack_handles([index for index, _ in held], [gen for _, gen in held]),
            [
                protocol.Right(rid, protocol.pack_handles([i for i, _ in pins], [g for _, g in pins]))
                for rid, pins in client.pins.items()
            ],
        )
        self._send(client, ask, "answered")
        client.settled = max(client.settled, ask.settled)

    def time_passes(self, dice: Random) -> None:
        self.now_ns += dice.choice((1, 400, 1_000, LEASE_MS, 6_000)) * MS
        self.directory.tick(self.now_ns)

    # -- requests under way

    def something_late_arrives(self, dice: Random) -> None:
        client = self._clients(dice, lambda each: each.under_way)
        if client is not None:
            late = dice.choice(client.under_way)
            if late.done:
                self._hear(client, late)
            else:
                self._arrive(client, late)

    def client_gives_up(self, dice: Random) -> None:
        client = self._clients(dice, lambda each: each.under_way)
        if client is not None:
            dice.choice(client.under_way).given_up = True

    def request_is_sent_again(self, dice: Random) -> None:
        client = self._clients(dice, lambda each: each.answered)
        if client is not None:
            frame, answer = client.answered[dice.choice(sorted(client.answered))]
            ask = protocol.decode_request(protocol.decode_envelope(frame).body)
            if isinstance(ask, protocol.Reserve | protocol.Commit | protocol.Acquire | protocol.Remove):
                assert self.requests.answer([frame], self._tick()) == answer
