"""What `python -m benchmarks` says of its figures, and that a part of it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import lmcache_backends, lmcache_contestants, report, slot, tiers
from benchmarks.gpu import copies, host, lmcache_kernel, matmul, peers, pieces, retrieve
from benchmarks.gpu.subject import Subject, counts_that_fit, own_segment
from benchmarks.processes import Pool
from benchmarks.report import (
    ROOT,
    Figure,
    at_least,
    at_most,
    interleaved,
    median_range,
    ratio,
    result_path,
    summary,
)
from benchmarks.slot import Part, Slot, run_part
from tests.processes.worker import eventually
from vcache.layout import KVLayout
from vcache.limits import KIB, MIB
from vcache.tiers import MemoryTier

SMALL = KVLayout(num_layers=3, num_kv_heads=2, head_size=16, dtype="bfloat16", chunk_tokens=64)
LATENT = KVLayout(num_layers=3, kv_parts=1, num_kv_heads=1, head_size=72, dtype="bfloat16", chunk_tokens=64)
LAYOUTS = {"small": SMALL, "latent": LATENT}


@pytest.mark.parametrize(("count", "left_out"), [(1, 0), (5, 0), (6, 0), (9, 1), (12, 2), (25, 7), (100, 39)])
def test_the_range_of_a_median_is_that_of_its_order_statistics(count: int, left_out: int) -> None:
    """As tables of the sign test have them: of 9 the second and the eighth, of 12 the third and the tenth."""
    assert median_range(list(range(count, 0, -1))) == (left_out + 1, count - left_out)


def test_bounds_hold_at_their_edge() -> None:
    assert at_most("a", 1.5, 1.5, "×").met
    assert not at_most("a", 1.51, 1.5, "×").met
    assert at_least("a", 0.8, 0.8, "×").met
    assert not at_least("a", 0.79, 0.8, "×").met


def test_numbers_are_readable() -> None:
    figure = at_least("rate", 1_910_960.65, 1_000_000, "keys/s")

    assert (figure.text, figure.wanted) == ("1,910,961 keys/s", "≥ 1,000,000 keys/s")
    assert at_most("ratio", 1.432, 1.5, "×").text == "1.43 ×"


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    assert ratio([2.0, 30.0, 6.0], [1.0, 10.0, 2.0]) == 3.0


def test_contestants_take_turns() -> None:
    order: list[str] = []

    def contestant(name: str) -> float:
        order.append(name)
        return float(len(order))

    assert interleaved([lambda: contestant("a"), lambda: contestant("b")], 2) == [[1.0, 3.0], [2.0, 4.0]]
    assert order == ["a", "b", "a", "b"]


def test_the_summary_names_what_was_missed() -> None:
    figures = [at_most("fast", 1, 2, "s"), at_most("slow", 3, 2, "s"), Figure("free", "7 GB/s")]

    assert summary(figures) == "1 of 2 bounds met\nmissed: slow: 3.00 s, wanted ≤ 2 s"


def test_a_result_is_written_under_its_day_cpu_and_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")

    path = command.write({"A part": [at_most("fast", 1, 2, "s")]}, "AMD EPYC 9B14")

    assert path.parent == tmp_path / "results"
    assert "-amd-epyc-9b14-" in path.name
    text = path.read_text(encoding="utf-8")
    assert "| fast | 1.00 s | ≤ 2 s | met |" in text
    assert "commit" in text


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["servr"])

    assert "got servr, wanted server, engine, transports, gpu" in capsys.readouterr().err


@pytest.mark.parametrize(("met", "code"), [(True, 0), (False, 1)])
def test_strict_fails_where_a_bound_was_missed(
    met: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(command.PARTS, "server", ("Server", lambda: [Figure("f", "1 s", "≤ 2 s", met)]))

    assert command.main(["server", "--strict"]) == code
    assert command.main(["server"]) == 0
    assert "1 of 1 bounds met" in capsys.readouterr().out or not met


# -- the parts for GPUs, on a CPU: what they measure is right, how fast does not matter


def names(figures: Iterator[Figure]) -> list[str]:
    return [figure.name for figure in figures]


def test_copies_have_a_figure_for_each_layout_place_and_direction() -> None:
    found = list(copies.figures(["shm:0", "shm:1"], LAYOUTS, (1, 8), 1))

    assert len(found) == 2 * 2 * 2 * 2
    bounded = {figure.name for figure in found if figure.met is not None}
    assert bounded == {figure.name for figure in found if "8 chunks" in figure.name}
    assert all("× memcpy" in figure.text for figure in found)


def test_what_does_not_fit_is_left_out_and_said() -> None:
    vast = KVLayout(num_layers=100, num_kv_heads=64, head_size=256, dtype="float32", chunk_tokens=320)

    assert counts_that_fit(vast, "shm:0", (1 << 20,)) == []
    assert [figure.text for figure in copies.figures(["shm:0"], {"vast": vast}, (1 << 20,), 1)] == [
        "left out: too little memory"
    ]


def test_a_copy_that_brings_other_bytes_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    with own_segment(SMALL, 2, "shm:0") as subject:
        monkeypatch.setattr(subject, "scatter", lambda: None)

        with pytest.raises(RuntimeError, match="layer 0 came back with other bytes"):
            next(copies.measured("broken", subject, 1))


def test_memcpy_is_one_piece_where_the_chunks_are_one() -> None:
    with own_segment(SMALL, 4, "shm:0") as subject:
        assert [place for _, place in subject.runs] == [(0, subject.bytes)]
        subject.flat.random_(0, 256)
        subject.memcpy_to()
        copied = torch.cat(subject.chunks)
        assert torch.equal(copied, subject.flat)


def test_the_way_through_the_host_is_beside_the_pool() -> None:
    found = names(host.figures(["shm:0"], {"small": SMALL}, (1,), 1))

    assert "small, 1 chunk, own GPU: there and back" in found
    assert any("a hop" in name for name in found)


def test_pieces_are_brought_by_both_ways() -> None:
    found = list(pieces.figures("shm:0", (4 * KIB, 64 * KIB), MIB, 1))

    assert [figure.name for figure in found] == [
        "256 pieces of 4 KiB",
        "16 pieces of 64 KiB",
        "the copy engine is faster from",
    ]


def test_a_retrieve_has_its_parts() -> None:
    found = names(retrieve.figures("shm:0", "shm:1", SMALL, 2))

    assert found == ["VCacheEngine.retrieve", *retrieve.PARTS, "the parts together"]


def test_a_product_is_measured_beside_copies_with_and_without_a_bound() -> None:
    found = names(matmul.figures("shm:0", SMALL, 32, 1))

    assert found[0] == "32 × 32 alone"
    assert "copies with no bound" in found and "copies with at most 1 multiprocessors" in found


def test_every_pair_is_opened_by_a_second_process() -> None:
    found = names(peers.figures(["shm:0", "shm:1"], 4 * MIB))

    assert [name for name in found if "opened" not in name] == [
        f"memory of shm:{holder}, process on shm:{reader}" for holder in range(2) for reader in range(2)
    ]


# -- LMCache's kernel: called as it wants to be called


def as_lmcache(subject: Subject) -> Callable[..., None]:
    """What its kernel does, in torch: chunks of [K/V, layer, token, hidden], slots over all pages."""

    def transfer(
        chunk: torch.Tensor,
        addresses: torch.Tensor,
        slots: torch.Tensor,
        device: torch.device,
        num_slots: int,
        direction: str,
        engine_format: str,
        **given: int,
    ) -> None:
        assert given == {"block_size": 16, "head_size": subject.layout.head_size}
        assert num_slots == subject.paged.num_slots
        for layer, (address, paged) in enumerate(zip(addresses.tolist(), subject.kvcaches, strict=True)):
            assert address == paged.data_ptr()
            tokens = paged.view(subject.layout.kv_parts, num_slots, -1)
            if direction == "D2H":
                chunk[:, layer] = tokens[:, slots]
            else:
                tokens[:, slots] = chunk[:, layer]

    return transfer


NATIVE = SimpleNamespace(
    EngineKVFormat=SimpleNamespace(NL_X_TWO_NB_BS_NH_HS="pages of K, pages of V", NL_X_NB_BS_HS="latent"),
    TransferDirection=SimpleNamespace(D2H="D2H", H2D="H2D"),
)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_lmcaches_kernel_is_called_as_it_is_defined(layout: KVLayout) -> None:
    with own_segment(layout, 2, "shm:0") as subject:
        theirs = lmcache_kernel.LMCacheKernel("0", as_lmcache(subject), cast(ModuleType, NATIVE))

        found = list(lmcache_kernel.beside("a layout", subject, theirs, 1))

    assert [figure.name for figure in found] == ["a layout, 2 chunks: store", "a layout, 2 chunks: retrieve"]


def test_a_kernel_that_moves_other_bytes_is_no_contestant() -> None:
    def nothing(*_: Any, **__: Any) -> None:
        return

    with own_segment(SMALL, 1, "shm:0") as subject:
        theirs = lmcache_kernel.LMCacheKernel("0", nothing, cast(ModuleType, NATIVE))

        with pytest.raises(RuntimeError, match="did not bring"):
            next(lmcache_kernel.beside("a layout", subject, theirs, 1))


def test_without_lmcache_the_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmcache_kernel, "_PACKAGE", "no-such-package-as-this")

    (figure,) = lmcache_kernel.figures("shm:0", LAYOUTS, (1,))

    assert (figure.name, figure.text) == ("LMCache's kernel", "not installed")


# -- without a GPU


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Where no GPU is to be seen, whatever the machine has."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["benchmarks/gpu_there.py"], 1), (["-m", "benchmarks", "gpu"], 2), (["-m", "benchmarks.slot"], 2)],
)
def test_without_a_gpu_it_says_so_at_once(arguments: list[str], code: int) -> None:
    ran = python(*arguments)

    assert ran.returncode == code
    assert "no GPU here: " in ran.stderr and "Traceback" not in ran.stderr


# -- the slot: every part is bounded, and costs no other its time


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(slot, "LOGS", tmp_path)
    return tmp_path


def part(code: str, **given: Any) -> Part:
    return Part("a part", [sys.executable, "-c", code], 60, **given)


def test_a_part_passes_or_fails_with_its_last_words(logs: Path) -> None:
    passed, failed = (
        run_part(part("print('12 passed')"), 60),
        run_part(part("raise SystemExit('broken')"), 60),
    )

    assert passed.passed and passed.said.startswith("12 passed (")
    assert not failed.passed and failed.said.startswith("broken (")


def test_a_part_that_hangs_is_ended_with_all_that_it_started(logs: Path) -> None:
    code = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN if len(sys.argv) > 1 else signal.default_int_handler)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )

    outcome = run_part(part(code), 3)

    assert not outcome.passed and outcome.said.startswith("ended after")
    pid = int((logs / "a-part.log").read_text().split()[0])
    eventually(lambda: not is_running(pid), "what it had started has ended")


def is_running(pid: int) -> bool:
    """A zombie whose parent has gone is gone, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_figures_of_a_part_are_kept_also_if_it_ends_early(logs: Path) -> None:
    rows = '{"A title": [{"name": "f", "text": "1 s", "wanted": "", "met": null}]}'
    code = f"import sys; open(sys.argv[2], 'w').write({rows!r}); raise SystemExit(3)"

    outcome = run_part(part(code, has_figures=True), 60)

    assert not outcome.passed
    assert outcome.figures == {"A title": [Figure("f", "1 s")]}


def test_process_tests_are_told_their_device_and_nothing_of_the_callers(
    logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VCACHE_POLICY", "s3fifo")
    code = "import os; print(sorted(each for each in os.environ.items() if each[0].startswith('VCACHE')))"

    assert "[('VCACHE_TEST_DEVICE', 'cuda:0')]" in run_part(part(code, device="cuda:0"), 60).said


def test_a_slot_goes_on_after_a_failure_and_writes_after_every_part(logs: Path) -> None:
    path = logs / "results" / "today.md"
    run = Slot(60, path, ["one GPU"])
    codes: Sequence[str] = ("print('3 passed')", "raise SystemExit('broken')", "print('4 passed')")

    for code in codes:
        run.run([part(code)])
        assert path.exists()

    text = path.read_text(encoding="utf-8")
    assert [outcome.passed for outcome in run.outcomes] == [True, False, True]
    assert "2 of 3 bounds met" in text and "broken" in text and "one GPU" in text


def test_without_time_a_part_is_not_begun(logs: Path) -> None:
    run = Slot(0, logs / "today.md", [])

    run.run([part("print('passed')")])

    assert [(outcome.passed, outcome.said) for outcome in run.outcomes] == [(False, "no time was left")]


def test_several_gpus_add_what_needs_them(capsys: pytest.CaptureFixture[str]) -> None:
    one, two = ({each.name for wave in slot.waves(count) for each in wave} for count in (1, 2))

    assert one < two
    assert all("cuda:1" in name for name in two - one)
    assert slot.main(["--list"]) == 0
    assert "one GPU: what needs several is left out" in capsys.readouterr().out
    assert slot.main(["--list", "--gpus", "2"]) == 0
    assert "cuda:0,cuda:1" in capsys.readouterr().out


def test_a_result_of_a_gpu_is_named_after_it() -> None:
    assert result_path("H100 80GB HBM3", "1a2b3c4").name.endswith("-h100-80gb-hbm3-1a2b3c4.md")


def test_a_tiers_rounds_put_new_chunks_and_get_those_of_the_last_round() -> None:
    tier = MemoryTier(MIB)
    contestant = tiers.of_tier(tier, torch.zeros(KIB, dtype=torch.uint8), 3)
    assert all(seconds > 0 for seconds in (contestant.put(), contestant.put(), contestant.get()))
    assert len(tier) == 6 and len(contestant.calls) == 9
    assert contestant.p99_ms().endswith(" ms") and contestant.calls == []
    tier.clear()
    with pytest.raises(RuntimeError, match="memory has lost a chunk"):
        contestant.get()


# -- beside LMCache's backends


def test_lmcache_is_missed_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lmcache_backends, "find_spec", lambda _: None)

    assert lmcache_backends.main([]) == 2
    assert "LMCache is not installed here" in capsys.readouterr().err


def test_peers_that_are_not_installed_are_left_out_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmcache_contestants, "find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    contest = lmcache_contestants.Contest(cast(Pool, None), ExitStack())

    assert [*contest._redis(), *contest._mooncake()] == []
    assert "Debian: redis-server" in contest.left_out["RemoteBackend to Redis"]
    assert "pip install mooncake" in contest.left_out["RemoteBackend to Mooncake"]
