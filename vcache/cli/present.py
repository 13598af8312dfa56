"""How things are shown: tables and sizes for people, JSON for programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

_WIDTH_OF_PIPES: Final = 160
"""Columns where nobody says how many there are: a table that is piped to grep must not be wrapped at 80."""

_WIDTH_WANTED: Final = 10_000
"""Columns so many that no table is narrowed: for how wide it would like to be."""

_BAR: Final = 12


def console(*, errors: bool = False) -> Console:
    """A console on standard output, or on standard error."""
    from rich.console import Console

    stream = sys.stderr if errors else sys.stdout
    is_piped = not stream.isatty() and "COLUMNS" not in os.environ
    return Console(file=stream, width=_WIDTH_OF_PIPES if is_piped else None, highlight=False)


def table(title: str, *columns: str) -> Table:
    """An empty table; columns that begin with ">" are right-justified.

    Where the terminal is too narrow for it, its rows are printed one below the other, a line for each cell.
    """
    from rich import box

    made = _table_class()(
        title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    return made


@cache
def _table_class() -> type[Table]:
    from rich.measure import Measurement
    from rich.table import Table

    class FittingTable(Table):
        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            as_wide_as_it_is = options.update_width(_WIDTH_WANTED)
            if Measurement.get(console, as_wide_as_it_is, self).maximum <= options.max_width:
                yield from super().__rich_console__(console, options)
            else:
                yield _records(self)

    return FittingTable


def _records(table: Table) -> Text:
    """The rows one below the other."""
    from rich.text import Text

    names = [str(column.header) for column in table.columns]
    width = max(map(len, names), default=0)
    title = [Text(str(table.title), "bold")] if table.title else []
    blocks = [
        Text("\n").join(
            Text(f"  {name:{width}}  ").append_text(text(cell)) for name, cell in zip(names, row, strict=True)
        )
        for row in zip(*(column.cells for column in table.columns), strict=True)
    ]
    end = [Text(str(table.caption))] if table.caption else []
    return Text("\n").join([*title, Text("\n\n").join(blocks), *end])


def add_row(to: Table, cells: Iterable[object], style: str | None = None) -> None:
    """Add cells to a table, as `text`."""
    to.add_row(*map(text, cells), style=style)


def text(value: object, style: str = "") -> Text:
    """A value as it is: what peers chose (names, labels) is no markup and no terminal escape here."""
    from rich.text import Text

    if isinstance(value, Text):
        return value
    shown = str(value)
    return Text(shown if shown.isprintable() else ascii(shown)[1:-1], style)


def lines(*each: str) -> Text:
    """Some lines, each as `text`."""
    from rich.text import Text

    return Text("\n").join(map(text, each))


def size(count: float) -> str:
    """Bytes for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def counted(count: int, what: str) -> str:
    """A number of things: "1 warning", "2 warnings"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def share(part: float, whole: float) -> str:
    """A share in percent; "–" of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def bar(part: float, whole: float) -> str:
    """A share as a bar and in percent."""
    filled = min(_BAR, round(_BAR * part / whole)) if whole else 0
    return f"{'█' * filled}{'░' * (_BAR - filled)} {share(part, whole):>7}"


def duration(seconds: float) -> str:
    """A time for people, in its two largest units: "2 h 5 min"."""
    if seconds < 120:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def plain(value: Any) -> Any:
    """Structs as dicts and bytes as hexadecimal digits, for JSON."""
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return bytes(value).hex() if isinstance(value, (bytes, bytearray, memoryview)) else value


def write_json(value: Any) -> None:
    """One JSON value on one line of standard output, at once."""
    sys.stdout.write(msgspec.json.encode(plain(value)).decode() + "\n")
    sys.stdout.flush()
