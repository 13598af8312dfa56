"""The client: a process' session with the metadata server, its requests, and the segments that it maps."""

from __future__ import annotations

from vcache.client.client import Client
from vcache.client.grants import Grant, Reservation
from vcache.client.moving import Move

__all__ = ["Client", "Grant", "Move", "Reservation"]
