"""The parts of the vLLM connector that need no vLLM; with real vLLM: `make test-vllm`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from integration.vllm.hits import first_needed, longest_hit
from integration.vllm.saves import pages_of_chunk
from integration.vllm.settings import read_settings
from vcache.errors import ConfigError

LAUNCH_FILES = sorted((Path(__file__).parents[1] / "configs" / "vllm").glob("*.sh"))
T, F = True, False


@pytest.mark.parametrize(
    ("there", "windows", "first", "end"),
    [
        ([[T, T, T]], [0], 0, 3),
        ([[T, F, T]], [0], 0, 1),
        ([[F, T, T]], [0], 0, 0),
        ([[T, T]], [0], 5, 7),
        ([[T, T, T, T], [F, F, T, T]], [0, 32], 0, 4),  # the window's two chunks are there
        ([[T, T, T, T], [F, F, F, T]], [0, 33], 0, 0),  # it reaches into a third one
        ([[T, T, T, F], [F, T, T, T]], [0, 16], 0, 3),  # the full group decides
        ([[T, T, T], [F, F, F]], [0, 16], 0, 0),
        ([[T, T, T], [T, F, F]], [0, 100], 0, 1),  # a window longer than the sequence
    ],
)
def test_a_hit_ends_where_every_group_has_what_it_looks_at(
    there: list[list[bool]], windows: list[int], first: int, end: int
) -> None:
    assert longest_hit(there, windows, first=first, chunk_tokens=16) == end


@given(
    flags=st.integers(1, 12).flatmap(
        lambda count: st.lists(
            st.lists(st.booleans(), min_size=count, max_size=count), min_size=1, max_size=3
        )
    ),
    windows=st.lists(st.sampled_from([0, 1, 15, 16, 17, 40, 200]), min_size=3, max_size=3),
    first=st.integers(0, 4),
)
def test_it_is_the_longest(flags: list[list[bool]], windows: list[int], first: int) -> None:
    def holds(end: int) -> bool:
        return all(
            all(group[first_needed(end, first, 16, window) - first : end - first])
            for group, window in zip(flags, windows, strict=False)
        )

    count = len(flags[0])
    expected = next((end for end in range(first + count, first, -1) if holds(end)), first)
    assert longest_hit(flags, windows[: len(flags)], first=first, chunk_tokens=16) == expected


def test_a_chunk_with_a_page_that_is_not_kept_is_not_captured() -> None:
    full, window = [5, 6, 7, 8], [0, 0, 11, 12]
    both = pages_of_chunk(1, [full, window], [2, 2])
    assert both is not None and both.pages == ((7, 8), (11, 12)) and both.page_ids() == [7, 8, 11, 12]
    one = pages_of_chunk(0, [full, window], [2, 2])
    assert one is not None and one.pages == ((5, 6), None)
    assert pages_of_chunk(0, [window], [2]) is None
    assert pages_of_chunk(2, [full], [2]) is None  # beyond the table


def test_settings_and_vcache_s_own_fields_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCACHE_CLIENT_REQUEST_TIMEOUT_MS", "77")
    extra = {"chunk_tokens": 64, "segment.size": "1MiB", "server": {"autostart": False}, "device": "shm:3"}
    settings, config = read_settings(extra)
    assert settings.chunk_tokens == 64 and settings.load == "auto"
    assert config.segment.size == 1 << 20 and not config.server.autostart
    assert config.client.request_timeout_ms == 77
    assert config.device == "shm:3"


def test_the_file_is_named_by_a_setting(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("segment: {size: 3MiB}\n")
    assert read_settings({"config": str(path)}).config.segment.size == 3 << 20


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"load": "fast"}, r"load \(from kv_connector_extra_config\): got 'fast', wanted 'auto', 'sync' or"),
        ({"chunk_tokens": "64"}, "chunk_tokens .*: got '64', wanted an integer"),
        ({"chunk_tokens": -1}, "chunk_tokens .*: got -1, wanted an integer >= 0"),
        ({"store": 1}, "store .*: got 1, wanted true or false"),
        ({"lookup_deadline": 1}, "lookup_deadline .*: unknown field; did you mean 'lookup_deadline_ms'"),
        ({"segment.sise": 1}, r"segment.sise \(from kv_connector_extra_config\): unknown field"),
        ({"segment": {"size": "many"}}, r"segment.size \(from kv_connector_extra_config\): got 'many'"),
        ({"config": "/nowhere.yaml"}, r"config \(from kv_connector_extra_config\): /nowhere.yaml: cannot be"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name(extra: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_settings(extra)


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_a_launch_file_s_configuration_is_accepted(path: Path) -> None:
    found = re.findall(r"--kv-transfer-config '(\{.*?\})'", path.read_text(), re.DOTALL)
    assert len(found) == 1
    transfer = json.loads(found[0])
    ours = [transfer, *transfer["kv_connector_extra_config"].get("connectors", [])]
    ours = [each for each in ours if each["kv_connector"] == "VCacheConnector"]
    assert len(ours) == 1
    read_settings(ours[0]["kv_connector_extra_config"])
    assert transfer["kv_load_failure_policy"] == "recompute"


def test_there_are_launch_files() -> None:
    assert {path.stem for path in LAUNCH_FILES} == {"gpu", "multi-connector", "one-engine", "two-engines"}
