"""The client: a process' session with the metadata server, its requests, and the segments that it maps."""

from __future__ import annotations

from vcache.client.client import Client
from vcache.client.grants import Grant, Reservation
from vcache.client.moving import Move
from vcache.client.reading import Acquiring

__all__ = ["Acquiring", "Client", "Grant", "Move", "Reservation"]
