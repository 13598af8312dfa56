"""What `python -m benchmarks` says of its figures, and that a part of it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.report import Figure, at_least, at_most, interleaved, ratio, summary


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
