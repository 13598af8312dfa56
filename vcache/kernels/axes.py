"""The spelling of a paged tensor's dimensions: one letter per axis, such as `kpshd`.

    l layer · k K/V part · p page · s slot in the page · h head · d head_size (or MLA's latent) · b the page's
    bytes

Axes that share one dimension stand in parentheses, slowest first: `phs(kd)` is "K‖V interleaved per head".
`b` stands for a page whose inside has no axes to name (pages form only). Spaces are ignored.
"""

from __future__ import annotations

import re
from typing import Final

from vcache.errors import ArgumentError

_LETTERS: Final = "lkpshdb"
_PIECE: Final = re.compile(r"\(([a-z]{2,})\)|([a-z])")


def parse_axes(axes: str) -> tuple[str, ...]:
    """One string per dimension: `phs(kd)` gives `("p", "h", "s", "kd")`. Raises ArgumentError."""
    if not isinstance(axes, str):
        raise ArgumentError("axes", repr(axes), "a str such as 'kpshd'")
    spelled = "".join(axes.split())
    groups = tuple(match.group(1) or match.group(2) for match in _PIECE.finditer(spelled))
    rebuilt = "".join(f"({group})" if len(group) > 1 else group for group in groups)
    letters = "".join(groups)
    if rebuilt != spelled or set(letters) - set(_LETTERS) or len(set(letters)) != len(letters):
        wanted = f"each of some letters of {_LETTERS!r} once, such as 'kpshd', 'pkhsd', 'phs(kd)' or 'psd'"
        raise ArgumentError("axes", repr(axes), wanted)
    if "p" not in groups:
        raise ArgumentError("axes", repr(axes), "a dimension of pages, 'p', by itself")
    if any(set(group) & set("lpsb") for group in groups if len(group) > 1):
        raise ArgumentError("axes", repr(axes), "only k, h and d in parentheses")
    return groups


def require_axes(groups: tuple[str, ...], axes: str, needed: str, allowed: str) -> None:
    """Raise ArgumentError unless the axes contain all of `needed` and nothing but `allowed`."""
    letters = set("".join(groups))
    if not set(needed) <= letters <= set(allowed):
        optional = "".join(sorted(set(allowed) - set(needed)))
        wanted = f"axes {needed!r}" + (f", and of {optional!r} those that there are" if optional else "")
        raise ArgumentError("axes", repr(axes), wanted)
