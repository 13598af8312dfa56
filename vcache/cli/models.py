"""Names of models and layouts, as the server's labels have them: a digest says nothing to a person."""

from __future__ import annotations

from collections.abc import Mapping

from vcache.keys import namespace


def namespaces_of(model: str, labels: Mapping[str, str]) -> list[bytes]:
    """The namespaces that a person may mean by `model`: the name's own, given as digits, or so labelled."""
    spaces = {namespace(model)}
    spaces |= {bytes.fromhex(digest) for digest, label in labels.items() if model in (label, digest)}
    length = len(namespace(model))
    return sorted(space for space in spaces if len(space) == length)


def name_of(digest: bytes, labels: Mapping[str, str]) -> str:
    """The label of a namespace or layout; its digits where it has none."""
    return labels.get(digest.hex(), digest.hex())
