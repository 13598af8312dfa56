"""The copy benchmark: its rows and its command, on a small layout. Speeds are not asserted here."""

from __future__ import annotations

import msgspec
import pytest
import torch

from vcache.bench.copy import CopyRow, main, measure, memcpy
from vcache.errors import ArgumentError
from vcache.layout import KVLayout

SMALL = KVLayout(num_layers=2, num_kv_heads=2, head_size=16, dtype="float16", chunk_tokens=64)


def test_rows_name_what_was_measured() -> None:
    before = torch.get_num_threads()
    rows = measure(SMALL, 2, ["pages", "random-slots"], 1, axes="phs(kd)", rounds=2)
    assert [(row.name, row.order) for row in rows] == [
        ("memcpy to segment", ""),
        ("memcpy from segment", ""),
        ("gather", "pages"),
        ("scatter", "pages"),
        ("gather", "random-slots"),
        ("scatter", "random-slots"),
    ]
    assert all(row.bytes == 2 * SMALL.chunk_bytes and row.threads == 1 and row.seconds > 0 for row in rows)
    assert rows[0].ratio == rows[1].ratio == 1
    assert torch.get_num_threads() == before


def test_an_order_that_there_is_not_is_named() -> None:
    with pytest.raises(ArgumentError, match="order: got 'sideways'"):
        measure(SMALL, 1, ["sideways"], 1)  # type: ignore[list-item]


def test_memcpy_copies_everything() -> None:
    source, target = torch.arange(100, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)
    memcpy(target, source, 3)
    assert torch.equal(source, target)


def test_the_command_prints_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--chunks", "1", "--rounds", "1", "--json"]) == 0
    assert len(msgspec.json.decode(capsys.readouterr().out, type=list[CopyRow])) == 8
