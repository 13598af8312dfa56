"""One value of the configuration: what people may write for it, and what the error says if it is wrong.

Knows nothing of which fields there are: `vcache.config` does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from decimal import Decimal
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, inspect

from vcache.errors import ArgumentError, ConfigError

SIZE_MAX: Final = 1 << 62
"""No machine has more, and it fits the 63 bits that an offset in a file has."""

SIZE_WANTED: Final = "a number of bytes such as 2147483648, '2GiB' or '512MiB'"

Bytes = Annotated[int, Meta(ge=0, le=SIZE_MAX, extra={"wanted": SIZE_WANTED, "size": True})]
"""The type of a field that takes sizes with a unit and holds bytes."""

_SHOWN_MAX: Final = 200
"""Characters of a wrong value in a message: enough to find it by, and the message stays one line."""

_UNITS: Final = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 4096, "512MiB", "1.5 GiB" or "2GB" (decimal); raises `ArgumentError`.

    A bare "2G" is refused: half of the world means 7 % less by it.
    """
    if isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= SIZE_MAX:
        return size
    if isinstance(size, str):
        found = re.fullmatch(r"\s*([0-9]{1,19}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", size)
        unit = _UNITS.get(found[2].upper()) if found else None
        if found and unit:
            count = Decimal(found[1]) * unit
            if count == int(count) and count <= SIZE_MAX:
                return int(count)
    raise ArgumentError("size", repr(size), f"{SIZE_WANTED} (whole bytes, 4 EiB at most)")


def checked(name: str, value: object, type_: Any, source: str, *, is_text: bool) -> Any:
    """`value` as the field's type wants it; raises `ConfigError` that names field, source and value.

    `is_text`: the source can hold nothing but text (the environment), so "5" may be a number.
    """
    kind = inspect.type_info(type_)
    try:
        converted = msgspec.convert(_plain(value, kind), type_, strict=not is_text)
        if isinstance(converted, int) and 0 < converted < _extra(kind, "least", 0):
            raise msgspec.ValidationError
        return converted
    except (msgspec.ValidationError, ArgumentError):
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN_MAX else f"{shown[:_SHOWN_MAX]}…"
        raise ConfigError(f"{name} (from {source}): got {shown}, wanted {_wanted(kind, name)}") from None


def suggestion(name: str, candidates: Collection[str]) -> str:
    """The end of a message about an unknown name: the one that was meant, or all that there are."""
    from difflib import get_close_matches  # only a mistake needs it

    close = get_close_matches(name, candidates, n=1, cutoff=0.72)
    return f"; did you mean {close[0]!r}?" if close else f"; wanted one of {', '.join(candidates)}"


def _plain(value: object, kind: inspect.Type) -> object:
    """Paths as text, and text as what it stands for: names in any case, "none", sizes with a unit."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, str):
        return value
    for each in _kinds(kind):
        if isinstance(each, inspect.LiteralType) and value.lower() in each.values:
            return value.lower()
        if isinstance(each, inspect.NoneType) and value.lower() == "none":
            return None
    return parse_size(value) if _extra(kind, "size", False) else value


def _kinds(kind: inspect.Type) -> tuple[inspect.Type, ...]:
    return kind.types if isinstance(kind, inspect.UnionType) else (kind,)


def _extra(kind: inspect.Type, name: str, default: Any) -> Any:
    """What a type says beside what msgspec checks: `size`, as `Bytes`; `least` of what is not 0."""
    extras = [each.extra or {} for each in _kinds(kind) if isinstance(each, inspect.Metadata)]
    return next((extra[name] for extra in extras if name in extra), default)


def _wanted(kind: inspect.Type, name: str) -> str:
    if isinstance(kind, inspect.Metadata):
        return str((kind.extra or {})["wanted"])
    if isinstance(kind, inspect.UnionType):
        return " or ".join(_wanted(each, name) for each in kind.types)
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(repr(value) for value in kind.values)
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        what = "an integer" if isinstance(kind, inspect.IntType) else "a number"
        unit = " (milliseconds)" if name.endswith("_ms") else " (seconds)" if name.endswith("_s") else ""
        return f"{what} >= {kind.ge} and <= {kind.le}{unit}"
    if isinstance(kind, inspect.BoolType):
        return "true or false"
    assert isinstance(kind, inspect.NoneType)
    return "none"
