"""A well-behaved client beside a bad one: what the bad one does must cost it nothing."""

from __future__ import annotations

from tests.client_pool import LAYOUT, key, read, store
from tests.processes.pool import Pool
from tests.processes.worker import DEADLINE_S, eventually
from vcache.client import Client
from vcache.config import load
from vcache.limits import MIB
from vcache.segment import allocate

NUMBERS = [1, 2, 3, 4]


class Bystander:
    """A client that lends a segment, has stored some chunks, holds a pin, and never has to begin anew."""

    def __init__(self, pool: Pool) -> None:
        config = load(**pool.client_config()).config
        self.client = Client(config, name="bystander", new_segment=lambda: allocate("shm:0", 4 * MIB))
        assert self.client.wait_connected(DEADLINE_S)
        assert store(self.client, NUMBERS) == len(NUMBERS)
        self._pin = self.client.acquire([key(number) for number in NUMBERS], layout=LAYOUT, pin=True)

    def assert_unharmed(self) -> None:
        """It was served all the time, its chunks and its pin are there, and the server's books are right."""
        assert read(self.client, NUMBERS) == len(NUMBERS)
        assert self.client.intact(self._pin)
        troubles = {
            name: count for name, count in self.client.counters.items() if name in _TROUBLES and count
        }
        assert not troubles
        eventually(lambda: self.client.stats().counters["reservations"] == 0, "nobody reserves anything")
        assert self.client.stats().counters["pins"] == len(NUMBERS), "its own pins, and no others"
        self.client.check()

    def close(self) -> None:
        """End it."""
        self.client.release(self._pin)
        self.client.close()


_TROUBLES = ("connections_lost", "cold_starts", "requests_unanswered", "requests_refused", "protocol_errors")
