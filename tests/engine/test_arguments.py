"""Wrong arguments of the engine raise ArgumentError that names the field, its value and what is wanted."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vcache.config import load
from vcache.engine import VCacheEngine
from vcache.engine.arguments import checked_ids, masked_tokens
from vcache.errors import ArgumentError, ConfigError, EngineClosed, ForkedProcess, SegmentError
from vcache.layout import KVLayout
from vcache.limits import KIB, SEGMENT_BYTES_MIN
from vcache.segment import DATA_OFFSET, allocate
from vcache.tiers import MemoryTier

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_size=4, dtype="float32", chunk_tokens=4)
PAGES = KVLayout(
    num_layers=2,
    num_kv_heads=2,
    head_size=4,
    dtype="float32",
    chunk_tokens=4,
    form="pages",
    page_tokens=2,
    page_bytes=2 * 2 * 2 * 4 * 4,
    page_format="test",
)
TOKENS = list(range(10))
SLOTS = list(range(10))


def alone(runtime_dir: Path, **given: Any) -> VCacheEngine:
    """An engine without a server and without a segment."""
    given = {"layout": LAYOUT, "model": "m", "segment": {"size": 0}, **given}
    return VCacheEngine(runtime_dir=str(runtime_dir), server={"autostart": False}, **given)


@pytest.fixture
def engine(runtime_dir: Path) -> Iterator[VCacheEngine]:
    with alone(runtime_dir) as made:
        yield made


@pytest.fixture
def pages_engine(runtime_dir: Path) -> Iterator[VCacheEngine]:
    with alone(runtime_dir, layout=PAGES, kv_axes="pkshd") as made:
        yield made


def paged(layers: int = 2, pages: int = 5, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """vLLM's NHD layout, pages of 2 tokens."""
    return [torch.zeros(2, pages, 2, 2, 4, dtype=dtype) for _ in range(layers)]


STORE_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"tokens": []}, "tokens: got none, wanted at least one token"),
    ({"tokens": torch.empty(0, dtype=torch.int64)}, "tokens: got none"),
    ({"tokens": "hello"}, "tokens: got str"),
    ({"tokens": 5}, "tokens: got int"),
    ({"tokens": None}, "tokens: got NoneType"),
    ({"tokens": [0.5] * 10}, r"tokens: got float64 of shape \(10,\)"),
    ({"tokens": [[1, 2]] * 10}, r"tokens: got int64 of shape \(10, 2\)"),
    ({"slot_mapping": SLOTS[:9]}, "slot_mapping: got 9 entries, wanted 10, one per token"),
    ({"slot_mapping": [*SLOTS, 1]}, "slot_mapping: got 11 entries, wanted 10"),
    ({"slot_mapping": [*SLOTS[:9], 10]}, r"slot_mapping: got 10 at 9, wanted -1 \(none\) or 0 … 9"),
    ({"slot_mapping": [-2, *SLOTS[1:]]}, "slot_mapping: got -2 at 0, wanted -1"),
    ({"slot_mapping": torch.zeros(10)}, r"slot_mapping: got float32 of shape \(10,\)"),
    ({"slot_mapping": torch.zeros(5, 2, dtype=torch.int64)}, r"slot_mapping: got int64 of shape \(5, 2\)"),
    ({"slot_mapping": None}, "slot_mapping: got NoneType, wanted 1-D integers"),
    ({"slot_mapping": [True] * 10}, "slot_mapping: got bool"),
    ({"mask": [True] * 9}, "mask: got 9 entries, wanted 10, one per token"),
    ({"mask": [0] * 4 + [1] * 6}, "mask: got int64 of shape"),
    ({"mask": "FFFFTTTTTT"}, "mask: got .*wanted 1-D bool"),
    ({"mask": [[True], [True, False]]}, "mask: got list, wanted 1-D bool"),
    (
        {"mask": [False] * 4 + [True, False] + [True] * 4},
        "mask: got False at token 5 after True, wanted False for a prefix only",
    ),
    ({"mask": [True] * 9 + [False]}, "mask: got False at token 9 after True"),
    (
        {"mask": [False] * 3 + [True] * 7},
        r"mask: got 3 leading False, wanted a multiple of chunk_tokens \(4\)",
    ),
    ({"mask": torch.tensor([False] * 5 + [True] * 5)}, "mask: got 5 leading False"),
    ({"offset": 3}, r"offset: got 3, wanted a multiple of chunk_tokens \(4\)"),
    ({"offset": -4}, "offset: got -4, wanted 0 … 10"),
    ({"offset": 12}, "offset: got 12, wanted 0 … 10, for there are 10 tokens"),
    ({"offset": 4.0}, r"offset: got 4.0 \(float\), wanted a number of tokens"),
    ({"offset": True}, "offset: got True"),
    (
        {"offset": 8, "mask": [False] * 4 + [True] * 6},
        "offset: got 8, wanted 4, as many as the mask has False",
    ),
    ({"kvcaches": None}, "kvcaches: got NoneType, wanted the paged tensors"),
    ({"kvcaches": "layers"}, "kvcaches: got str"),
    ({"kvcaches": []}, "kvcaches: got 0 tensors, wanted 2, one per layer"),
    ({"kvcaches": paged(3)}, "kvcaches: got 3 tensors, wanted 2"),
    ({"kvcaches": [paged()[0], None]}, r"kvcaches\[1\]: got NoneType, wanted a torch.Tensor"),
    (
        {"kvcaches": paged(dtype=torch.bfloat16)},
        r"kvcaches\[0\].dtype: got torch.bfloat16, wanted torch.float32",
    ),
    (
        {"kvcaches": [*paged(1), *paged(1, dtype=torch.float16)]},
        r"kvcaches\[1\].dtype: got torch.float16, wanted torch.float32, as the first",
    ),
    (
        {"kvcaches": {"a": paged(1)[0], "b": paged(1, pages=4)[0]}},
        r"kvcaches\['b'\].shape: got .*, wanted .*, as the first",
    ),
    ({"kvcaches": [paged(1)[0], paged(1)[0].to("meta")]}, r"kvcaches\[1\]"),
    ({"kvcaches": [tensor[0] for tensor in paged()]}, r"kvcaches\[0\].shape: .*wanted 5 dimensions"),
    (
        {"kvcaches": [torch.zeros(2, 5, 2, 3, 4) for _ in range(2)]},
        r"kvcaches\[0\].shape: got .*wanted 2 at axis 3 \(h\), as the layout says",
    ),
]


@pytest.mark.parametrize(("mistake", "message"), STORE_MISTAKES)
def test_a_wrong_argument_of_store_is_named(
    engine: VCacheEngine, mistake: dict[str, Any], message: str
) -> None:
    given = {"tokens": TOKENS, "kvcaches": paged(), "slot_mapping": SLOTS, **mistake}
    tokens = given.pop("tokens")
    for call in (engine.store, engine.store_async):
        with pytest.raises(ArgumentError, match=message):
            call(tokens, **given)


@pytest.mark.parametrize(("mistake", "message"), [row for row in STORE_MISTAKES if "offset" not in row[0]])
def test_a_wrong_argument_of_retrieve_is_named(
    engine: VCacheEngine, mistake: dict[str, Any], message: str
) -> None:
    given = {"tokens": TOKENS, "kvcaches": paged(), "slot_mapping": SLOTS, **mistake}
    tokens = given.pop("tokens")
    for call in (engine.retrieve, engine.retrieve_async):
        with pytest.raises(ArgumentError, match=message):
            call(tokens, **given)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"keys": []}, "keys: got none, wanted at least one key"),
        ({"keys": b"x" * 32}, "keys: got bytes, wanted a sequence"),
        ({"keys": [b"x" * 32, b"x" * 31]}, r"keys\[1\]: got 31 bytes, wanted 32 bytes"),
        ({"keys": ["x" * 32]}, r"keys\[0\]: got str, wanted bytes"),
        ({"pages": [0, 1, 2]}, "pages: got 3 entries, wanted 4, one per page, 2 per key"),
        ({"pages": [0, 1, 2, 5]}, r"pages: got 5 at 3, wanted -1 \(none\) or 0 … 4"),
        ({"pages": [0, 1, 2, -2]}, "pages: got -2 at 3"),
        ({"kvcaches": paged()}, r"kvcaches\[0\].shape"),
    ],
)
def test_a_wrong_argument_of_the_pages_form_is_named(
    pages_engine: VCacheEngine, mistake: dict[str, Any], message: str
) -> None:
    tensors = [torch.zeros(5, 2, 2, 2, 4) for _ in range(2)]
    given = {"keys": [b"x" * 32, b"y" * 32], "kvcaches": tensors, "pages": [0, 1, 2, 3], **mistake}
    keys = given.pop("keys")
    for call in (
        pages_engine.store_pages,
        pages_engine.retrieve_pages,
        pages_engine.store_pages_async,
        pages_engine.retrieve_pages_async,
    ):
        with pytest.raises(ArgumentError, match=message):
            call(keys, **given)


def test_each_form_says_which_calls_are_for_it(engine: VCacheEngine, pages_engine: VCacheEngine) -> None:
    tensors, keys = paged(), [b"x" * 32]
    for_pages: list[Callable[[], object]] = [
        lambda: engine.lookup_pages(keys),
        lambda: engine.store_pages(keys, kvcaches=tensors, pages=[0, 1]),
        lambda: engine.retrieve_pages(keys, kvcaches=tensors, pages=[0, 1]),
    ]
    for_tokens: list[Callable[[], object]] = [
        lambda: pages_engine.lookup(TOKENS),
        lambda: pages_engine.store(TOKENS, kvcaches=tensors, slot_mapping=SLOTS),
        lambda: pages_engine.retrieve(TOKENS, kvcaches=tensors, slot_mapping=SLOTS),
    ]
    for call in for_pages:
        with pytest.raises(ArgumentError, match=r"layout.form: got 'tokens', wanted 'pages' for this call"):
            call()
    for call in for_tokens:
        with pytest.raises(ArgumentError, match=r"layout.form: got 'pages', wanted 'tokens' for this call"):
            call()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (b"", "cache_key: got 0 bytes, wanted 32 bytes"),
        (b"x" * 33, "cache_key: got 33 bytes"),
        ("x" * 32, "cache_key: got str, wanted bytes"),
        (None, "cache_key: got NoneType"),
    ],
)
def test_contains_wants_a_key(engine: VCacheEngine, key: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        engine.contains(key)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layout": None}, "layout: got NoneType, wanted a KVLayout"),
        ({"model": ""}, "model: got ''"),
        ({"model": 5}, "model: got 5"),
        ({"rank": -1}, "rank: got -1"),
        ({"kv_axes": "kpxhd"}, "axes: got 'kpxhd'"),
        ({"tiers": 5}, "tiers: got int"),
        ({"tiers": [object()]}, r"tiers\[0\]: got object, wanted a Tier"),
        ({"config": load().config}, "config: got one, and runtime_dir, segment, server as well"),
    ],
)
def test_a_wrong_argument_of_the_constructor_is_named(
    runtime_dir: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        alone(runtime_dir, **given)


def test_a_wrong_override_is_an_error_of_the_configuration(runtime_dir: Path) -> None:
    with pytest.raises(ConfigError, match="chunk_size"):
        alone(runtime_dir, chunk_size=5)


class _FailsLate(MemoryTier):
    """A tier that works until there is a client, whose threads run."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self._threads = threading.active_count()

    @property
    def name(self) -> str:
        if threading.active_count() > self._threads:
            raise ZeroDivisionError
        return "late"


def test_an_engine_that_cannot_be_made_leaves_nothing(runtime_dir: Path) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        alone(runtime_dir, tiers=[_FailsLate()])
    assert set(threading.enumerate()) <= before


def test_the_smallest_segment_that_may_be_configured_holds_a_page(runtime_dir: Path) -> None:
    alone(runtime_dir, segment={"size": SEGMENT_BYTES_MIN}).close()
    with allocate("shm:0", SEGMENT_BYTES_MIN) as segment:
        room = SEGMENT_BYTES_MIN - DATA_OFFSET
        assert room >= 4 * KIB and len(segment.view(DATA_OFFSET, room)) == room


def test_a_segment_larger_than_the_memory_is_refused_at_once(runtime_dir: Path) -> None:
    with pytest.raises(SegmentError, match="available of"):
        alone(runtime_dir, segment={"size": "512TiB"})


def test_a_mask_and_an_offset_that_agree_are_fine() -> None:
    assert masked_tokens([False] * 4 + [True] * 2, 4, 6, 4) == 4
    assert masked_tokens(torch.ones(6, dtype=torch.bool), None, 6, 4) == 0
    assert masked_tokens(np.zeros(8, bool), None, 8, 4) == 8
    assert masked_tokens(None, np.int64(4), 6, 4) == 4
    assert masked_tokens(None, None, 6, 4) == 0


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda ids: np.array(ids, np.int32)])
def test_slots_may_come_in_any_integer_form(kind: Any) -> None:
    ids = checked_ids("slot_mapping", kind([3, -1, 0]), 3, 4, "token")
    assert ids.dtype == torch.int64
    assert ids.tolist() == [3, -1, 0]


def test_slots_are_copied_so_that_a_later_change_does_not_count() -> None:
    slots = torch.tensor([1, 2])
    ids = checked_ids("slot_mapping", slots, 2, 4, "token")
    slots[0] = 3
    assert ids.tolist() == [1, 2]


def test_without_a_server_everything_is_a_miss(engine: VCacheEngine) -> None:
    tensors = paged()
    assert engine.lookup(TOKENS) == 0
    engine.store(TOKENS, kvcaches=tensors, slot_mapping=SLOTS)
    assert engine.retrieve(TOKENS, kvcaches=tensors, slot_mapping=SLOTS).tolist() == [False] * 10
    assert engine.contains(b"x" * 32) == -1
    assert engine.store_async(TOKENS, kvcaches=tensors, slot_mapping=SLOTS).result(5) == 0
    assert not engine.retrieve_async(TOKENS, kvcaches=tensors, slot_mapping=SLOTS).result(5).any()
    stats = engine.get_stats()
    assert stats["connected"] == 0
    assert stats["hits"] == 0
    assert stats["misses"] == 4
    assert stats["unstored_chunks"] == 4
    assert int(stats["failed_no_server"]) >= 6


def test_a_closed_engine_says_so(runtime_dir: Path) -> None:
    engine = alone(runtime_dir)
    engine.close()
    engine.close()
    for call in (
        lambda: engine.lookup(TOKENS),
        lambda: engine.store(TOKENS, kvcaches=paged(), slot_mapping=SLOTS),
        lambda: engine.contains(b"x" * 32),
        engine.get_stats,
    ):
        with pytest.raises(EngineClosed, match="engine 'engine' is closed"):
            call()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_cannot_use_the_engine_and_ends_by_itself(engine: VCacheEngine) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            engine.lookup(TOKENS)
        except ForkedProcess:
            engine.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert engine.lookup(TOKENS) == 0


@pytest.mark.parametrize(
    "given",
    [
        {"model": None},
        {"lora": None},
        {"cache_salt": 5},
        {"kv_axes": None},
        {"name": "n" * 70_000},
        {"name": None},
    ],
    ids=lambda given: f"{next(iter(given))}",
)
def test_an_identity_that_is_no_text_is_refused(given: dict[str, Any], runtime_dir: Path) -> None:
    settings: dict[str, Any] = {"layout": LAYOUT, "model": "m", "runtime_dir": str(runtime_dir / "run")}
    with pytest.raises(ArgumentError, match=next(iter(given)).removeprefix("kv_")):
        VCacheEngine(**{**settings, "segment": {"size": 0}, "server": {"autostart": False}, **given})
