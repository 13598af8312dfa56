"""What the demo prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.table import Table

from demo.messages import Ready, Served

MIB: Final = 1 << 20

INTRODUCTION: Final = """\
Two workers serve chats about one long document. Each has its own transformer (Llama, {parameters:.0f} \
million random weights, the same seed) and its own paged KV cache. Worker 0 computes the document's KV \
and stores it in the pool; worker 1 reads it from there and goes on. [bold]Every answer is compared, \
token by token, with a run without cache by the same worker, and so is the KV of the prompt. One \
difference and the demo fails.[/bold] Two holders lend one segment of memory each, shm:0 and shm:1: \
shared memory that plays two GPUs. One byte of text is one token, {kv_kib:.0f} KiB of KV. The weights are \
random, so the answers are gibberish, but they depend on all of the prompt; and before each run the \
worker's pages are filled with NaN."""


CAPTION: Final = (
    "GB/s is that of the whole retrieve call; a worker's first one also maps the other's segment."
)


@dataclass(frozen=True)
class Row:
    """One prompt, served with the pool and without it."""

    title: str
    worker: str
    prompt_tokens: int
    served: Served
    plain: Served
    kv_difference: float  # largest between the KV of the prompt in both runs; 0.0: the same bits


def introduction(ready: Ready) -> str:
    """Return what a newcomer should know before the first line of results."""
    return INTRODUCTION.format(parameters=ready.parameters / 1e6, kv_kib=ready.kv_bytes_per_token / 1024)


def line(row: Row) -> str:
    """Return one line about a prompt, printed when it was served."""
    served = row.served
    source = (
        f"[green]{served.hit_tokens} from the pool[/green]" if served.hit_tokens else "none from the pool"
    )
    return f"  {row.worker}: {row.title}: {row.prompt_tokens} tokens, {source}; same answer as without cache"


def table(rows: list[Row]) -> Table:
    """Return the table of all prompts."""
    result = Table(
        title="Time to the first token, with the pool and without",
        title_justify="left",
        caption=CAPTION,
        caption_justify="left",
    )
    result.add_column("prompt")
    result.add_column("served by")
    for name in ("tokens", "hit tokens", "moved", "GB/s", "with cache", "without", "speed-up"):
        result.add_column(name, justify="right")
    result.add_column("answer")
    for row in rows:
        result.add_row(row.title, row.worker, *_cells(row))
    return result


def _cells(row: Row) -> list[str]:
    served, plain = row.served, row.plain
    hit = served.hit_tokens > 0
    return [
        str(row.prompt_tokens),
        str(served.hit_tokens),
        f"{served.moved_bytes / MIB:.1f} MiB" if hit else "-",
        f"{served.moved_bytes / served.retrieve_seconds / 1e9:.1f}" if hit else "-",
        f"{served.first_token_seconds * 1000:.0f} ms",
        f"{plain.first_token_seconds * 1000:.0f} ms",
        f"{plain.first_token_seconds / served.first_token_seconds:.1f} x",
        "[green]same[/green]",
    ]


def make_console() -> Console:
    """Return the console; where no terminal tells its width, wide enough for the table."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=132)


def verdict(rows: list[Row]) -> str:
    """Return what was shown, in a sentence or two."""
    hits = [row for row in rows if row.served.hit_tokens]
    moved = sum(row.served.moved_bytes for row in hits)
    difference = max(row.kv_difference for row in rows)
    same = "bit for bit the same" if difference == 0 else f"the same but for rounding ({difference:.0e})"
    return (
        f"[bold green]All {len(rows)} answers are the tokens of the run without cache[/bold green], "
        f"and the KV is {same}. {len(hits)} of them began with KV from the pool: {moved / MIB:.0f} MiB "
        "that was read and not computed."
    )
