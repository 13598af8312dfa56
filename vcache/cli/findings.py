"""What a check of the doctor says: what was found, whether that is well, and what to do if not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Literal, TypeAlias

import msgspec

from vcache.errors import Unavailable, VCacheError

Verdict: TypeAlias = Literal["ok", "warning", "failed", "skipped"]

MARKS: Final[dict[Verdict, tuple[str, str]]] = {
    "ok": ("✓", "green"),
    "warning": ("!", "yellow"),
    "failed": ("✗", "bold red"),
    "skipped": ("–", "dim"),
}
"""How each is shown: a sign and a style."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report.

    advice: what to do, where there is something to do. facts: numbers for programs. no_server: it failed for
    want of a server, not because something is broken.
    """

    check: str
    verdict: Verdict
    found: str
    advice: str = ""
    facts: dict[str, object] = {}
    no_server: bool = False


Check: TypeAlias = Callable[[], Iterator[Finding]]


def findings_of(name: str, check: Check) -> Iterator[Finding]:
    """What a check yields; a check that raises has failed with those words, and the next one goes on."""
    try:
        yield from check()
    except (VCacheError, OSError, ImportError, RuntimeError) as error:  # RuntimeError: torch's, on a GPU
        words = " ".join(str(error).split()) or type(error).__name__
        yield Finding(check=name, verdict="failed", found=words, no_server=isinstance(error, Unavailable))
