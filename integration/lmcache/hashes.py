"""Whether all engines hash tokens alike: LMCache's keys depend on an algorithm and a seed of each."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

from vcache.logs import Line
from vcache.protocol import SessionRow

_log = logging.getLogger("vcache.integration.lmcache")

_NAME = re.compile(r"lmcache (?P<role>\S+) model=(?P<model>[0-9a-f]{8}) hash=(?P<hash>[0-9a-f]{8})\Z")


def fingerprint(config: Any, metadata: Any) -> str:
    """What LMCache's own token database makes of known tokens: algorithm, seed and chunk size, as they are.

    The configuration does not tell: without vLLM every algorithm silently becomes Python's own.
    """
    from lmcache.v1.token_database import ChunkedTokenDatabase

    tokens = list(range(config.chunk_size))
    hashes = [
        str(chunk_hash)
        for _, _, chunk_hash in ChunkedTokenDatabase(config, metadata).process_tokens(
            tokens=tokens, make_key=False
        )
    ]
    return blake2b(",".join(hashes).encode(), digest_size=4).hexdigest()


def session_name(role: str, model: str, hashes: str) -> str:
    """The name of an engine's session, by which the others know how it hashes."""
    return f"lmcache {role} model={blake2b(model.encode(), digest_size=4).hexdigest()} hash={hashes}"


class Comparison:
    """Compares our hashes with other sessions', and warns once of each that differs."""

    def __init__(self, name: str, algorithm: str) -> None:
        self._name = name
        self._algorithm = algorithm
        self._warned: set[int] = set()

    def look(self, sessions: Iterable[SessionRow]) -> list[SessionRow]:
        """Those of the same model that hash otherwise and were not warned of before."""
        ours = _NAME.match(self._name)
        differing = []
        for row in sessions:
            theirs = _NAME.match(row.name)
            if ours is None or theirs is None or row.session in self._warned:
                continue
            if theirs["model"] == ours["model"] and theirs["hash"] != ours["hash"]:
                self._warned.add(row.session)
                differing.append(row)
        for row in differing:
            _log.warning(
                Line(
                    "another engine of this model hashes tokens differently, so neither finds what the other "
                    "stores: set the same chunk_size and pre_caching_hash_algorithm: sha256_cbor in both "
                    "(with vLLM installed), or the same PYTHONHASHSEED for builtin",
                    other_pid=row.pid,
                    other=row.name,
                    own=self._name,
                    algorithm=self._algorithm,
                    pythonhashseed=os.environ.get("PYTHONHASHSEED", "not set"),
                )
            )
        return differing
