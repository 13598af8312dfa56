"""The chunk record: whatever happened to its bytes, it is the chunk that was put, or no chunk."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcache.limits import RECORD_HEADER_BYTES
from vcache.tiers.record import Flaw, Header, flaw_of, has_expired, header_for, read_header

KEY, LAYOUT = bytes(range(32)), b"L" * 16

moments = st.integers(0, (1 << 63) - 1)
keys = st.binary(min_size=32, max_size=32)
layouts = st.binary(min_size=16, max_size=16)


def verdict(record: bytes, key: bytes = KEY, layout: bytes = LAYOUT) -> Flaw | None:
    header = read_header(record[:RECORD_HEADER_BYTES])
    return header if isinstance(header, Flaw) else flaw_of(header, key, layout, record[RECORD_HEADER_BYTES:])


def record(chunk: bytes, key: bytes = KEY, layout: bytes = LAYOUT) -> bytes:
    return header_for(key, layout, chunk, 1_000).pack() + chunk


@given(keys, layouts, st.binary(min_size=1, max_size=200), moments, moments)
def test_what_was_put_is_read(key: bytes, layout: bytes, chunk: bytes, created: int, expires: int) -> None:
    header = header_for(key, layout, chunk, created, expires)
    raw = header.pack()
    assert len(raw) == RECORD_HEADER_BYTES
    assert read_header(raw) == header
    assert verdict(raw + chunk, key, layout) is None


@given(st.binary(min_size=1, max_size=64), st.data())
def test_one_changed_bit_is_seen(chunk: bytes, data: st.DataObject) -> None:
    raw = bytearray(record(chunk))
    at = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[at // 8] ^= 1 << at % 8
    assert verdict(bytes(raw)) is not None


@given(st.binary(min_size=1, max_size=64), st.data())
def test_a_truncated_or_longer_record_is_none(chunk: bytes, data: st.DataObject) -> None:
    raw = record(chunk)
    assert verdict(raw[: data.draw(st.integers(0, len(raw) - 1))]) is not None
    assert verdict(raw + data.draw(st.binary(min_size=1, max_size=8))) is not None


@given(st.binary(max_size=400))
def test_what_is_no_record_is_none(raw: bytes) -> None:
    assert verdict(raw) is not None


def test_another_chunk_layout_or_version_is_named() -> None:
    raw = record(b"chunk")
    assert verdict(raw, key=b"K" * 32) is Flaw.KEY
    assert verdict(raw, layout=b"M" * 16) is Flaw.LAYOUT
    assert verdict(raw[:-1] + b"X") is Flaw.CHUNK
    assert verdict(raw[:-1]) is Flaw.LENGTH
    for version in (2, 4):
        assert verdict(raw[:8] + struct.pack("<H", version) + raw[10:]) is Flaw.VERSION
    assert verdict(b"\0" * 8 + raw[8:]) is Flaw.NOT_OURS
    assert verdict(raw[:70] + b"\1" + raw[71:]) is Flaw.HEADER


def test_the_format_does_not_change_by_accident() -> None:
    """Records of an installation outlive it: this one was written by the third version."""
    header = Header(LAYOUT, KEY, 5, 1_000, 2_000, 0x0123456789ABCDEF)
    assert header.pack().hex() == (
        "56434143485245430300800000000000" + "4c" * 16 + bytes(range(32)).hex() + "0500000000000000"
        "e803000000000000d007000000000000efcdab8967452301" + "00" * 24 + "eb56d62be42b4e87"
    )


@pytest.mark.parametrize(
    ("created", "expires", "ttl_s", "expiry"),
    [(1_000, 0, 0.0, 0), (1_000, 0, 2.0, 3_000), (1_000, 9_000, 2.0, 3_000), (1_000, 2_000, 9.0, 2_000)],
)
def test_the_earlier_of_both_expiries_counts(created: int, expires: int, ttl_s: float, expiry: int) -> None:
    header = Header(LAYOUT, KEY, 5, created, expires, 0)
    assert header.expiry_ms(ttl_s) == expiry
    assert has_expired(expiry, 10_000) is (expiry > 0)
    assert not has_expired(expiry, expiry - 1)
