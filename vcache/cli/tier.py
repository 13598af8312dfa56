"""The lower tiers: what is in the local one, whether its records are whole, and emptying them.

status   records, bytes, settings and counters of the local tier
ls       its records, in the order of their keys
get      one record's header; with --out its bytes, too
verify   read every record and compare its checksum; damaged ones are deleted
purge    forget all chunks in every configured tier
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcache.cli import present
from vcache.cli.exits import Exit
from vcache.cli.invocation import Invocation
from vcache.errors import ArgumentError, Unavailable, VCacheError
from vcache.limits import KEY_BYTES, RECORD_HEADER_BYTES

if TYPE_CHECKING:
    from vcache.tiers.rocksdb.messages import Row, State
    from vcache.tiers.rocksdb.tier import RocksTier

_KEY_DIGITS = 16
_READY_S = 10.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vcache tier`."""
    parser.add_argument("action", choices=("status", "ls", "get", "verify", "purge"))
    parser.add_argument("key", nargs="?", help="of get: the chunk key, 64 hexadecimal digits")
    parser.add_argument("--limit", type=int, default=50, metavar="N", help="of ls: rows; 0: all (default 50)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of get: write the chunk's bytes there")
    parser.add_argument("--yes", action="store_true", help="of purge: do not ask")


def run(invocation: Invocation) -> int:
    """Do what `action` says."""
    from vcache.tiers.configured import default_directory, rocks_tier
    from vcache.tiers.rocksdb.owner import LOG

    options = invocation.options
    if (options.key is None) == (options.action == "get"):
        raise ArgumentError("KEY", options.key, "a chunk key for get, and none for the other actions")
    if options.action == "purge":
        return _purge(invocation)
    directory = Path(invocation.config.tiers.rocksdb.directory or default_directory()).expanduser()
    if not directory.is_dir():
        raise Unavailable(f"tiers.rocksdb.directory: there is no local tier at {directory}")
    tier = rocks_tier(invocation.config, observes=True)
    try:
        if not tier.wait_ready():
            raise Unavailable(f"no owner of the database answers; {directory}/{LOG} may say why")
        actions = {"status": _status, "ls": _ls, "get": _get, "verify": _verify}
        return actions[options.action](invocation, tier)
    finally:
        tier.close()


def _status(invocation: Invocation, tier: RocksTier) -> int:
    state = tier.state()
    if invocation.as_json:
        present.write_json(state)
        return Exit.OK
    table = present.table("", "", ">")
    rows: list[tuple[str, object]] = [
        ("directory", str(tier.directory)),
        ("owner", f"process {state.pid}, {state.connections} connections"),
        ("records", f"{state.records:,}"),
        *_held(state),
        ("time to live", present.duration(state.ttl_s) if state.ttl_s else "none"),
        *state.counters.items(),
    ]
    for row in rows:
        present.add_row(table, row)
    present.console().print(table)
    return Exit.OK


def _held(state: State) -> list[tuple[str, object]]:
    held = present.size(state.held_bytes)
    if not state.capacity_bytes:
        return [("held", f"{held}; no engine has said yet how much it may be")]
    return [
        ("held", present.bar(state.held_bytes, state.capacity_bytes)),
        ("", f"{held} of {present.size(state.capacity_bytes)}"),
    ]


def _ls(invocation: Invocation, tier: RocksTier) -> int:
    limit = invocation.options.limit
    if limit < 0:
        raise ArgumentError("--limit", limit, "0 or more")
    rows = list(itertools.islice(tier.rows(), limit or None))
    if invocation.as_json:
        present.write_json({"records": rows})
        return Exit.OK
    now_s = time.time()
    table = present.table("", "key", "layout", ">size", ">age", ">idle", ">expires")
    for row in rows:
        left_s = row.expires_ms / 1e3 - now_s
        present.add_row(
            table,
            [
                row.key.hex()[:_KEY_DIGITS] + "…",
                row.layout.hex()[:_KEY_DIGITS],
                present.size(row.size),
                present.duration(max(now_s - row.created_ms / 1e3, 0)),
                present.duration(max(now_s - row.used_ms / 1e3, 0)),
                f"in {present.duration(max(left_s, 0))}" if row.expires_ms else "never",
            ],
        )
    console = present.console()
    console.print(table)
    console.print(present.text(f"{len(rows):,} of {tier.state().records:,} records"))
    return Exit.OK


def _get(invocation: Invocation, tier: RocksTier) -> int:
    wanted = invocation.options.key
    try:
        key = bytes.fromhex(wanted)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ArgumentError("KEY", wanted, f"{2 * KEY_BYTES} hexadecimal digits, as `ls --json` prints them")
    row = next((row for row in tier.rows() if row.key == key), None)
    content = None if row is None else _content(tier, row)
    if row is None or content is None:
        print("vcache: there is no such record, or it was damaged", file=sys.stderr)
        return Exit.FAILED
    if invocation.options.out is not None:
        invocation.options.out.write_bytes(content)
    present.write_json(row)
    return Exit.OK


def _verify(invocation: Invocation, tier: RocksTier) -> int:
    whole, damaged = 0, []
    for row in tier.rows():
        if _content(tier, row) is None:
            damaged.append(row.key)
        else:
            whole += 1
    if invocation.as_json:
        present.write_json({"whole": whole, "damaged": damaged})
    else:
        said = (
            f"{whole:,} records are whole; {len(damaged):,} were damaged or have just gone, and are deleted"
        )
        present.console().print(present.text(said))
    return Exit.FAILED if damaged else Exit.OK


def _content(tier: RocksTier, row: Row) -> bytes | None:
    """A record's bytes, compared with its checksum."""
    import torch

    into = torch.empty(row.size - RECORD_HEADER_BYTES, dtype=torch.uint8)
    return None if tier.get(row.key, into, row.layout) is None else into.numpy().tobytes()


def _purge(invocation: Invocation) -> int:
    from vcache.tiers.configured import make_tiers, tier_names

    names = tier_names(invocation.config)
    if not names:
        raise ArgumentError("tiers.order", "none", "the tiers to purge, in the configuration")
    if not invocation.options.yes:
        if not sys.stdin.isatty():
            wanted = f"--yes where nobody can be asked: this empties {', '.join(names)}"
            raise ArgumentError("--yes", "nothing", wanted)
        print(f"Forget all chunks in {', '.join(names)}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("vcache: nothing was forgotten", file=sys.stderr)
            return Exit.FAILED
    tiers: list[Any] = make_tiers(invocation.config, observes=True)
    failed: dict[str, str] = {}
    try:
        for tier in tiers:
            try:
                tier.wait_ready(_READY_S)
                tier.clear()
            except (VCacheError, OSError) as error:  # the others are emptied all the same
                failed[tier.name] = str(error)
    finally:
        for tier in tiers:
            tier.close()
    purged = [name for name in names if name not in failed]
    if invocation.as_json:
        present.write_json({"purged": purged, "failed": failed})
    elif purged:
        present.console().print(present.text(f"purged {', '.join(purged)}"))
    for name, why in failed.items():
        print(f"vcache: {name} was not purged: {why}", file=sys.stderr)
    return Exit.NO_SERVER if failed else Exit.OK
