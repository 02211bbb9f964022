"""The report of a theme: verdicts, missing peers, plots; and the command at tiny sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.report import Bar, Circumstances, Curve, Findings, Table, plot, render
from benchmarks.run import main

WHERE = Circumstances("x86_64 2-core", "x86-64-2-core", "2026-01-02", "abc1234", "torch 2.0", ("foolbox",))


@pytest.mark.parametrize(
    ("bar", "verdict"),
    [
        (Bar("at most", [0.9, 1.0, 1.3], 1.05), "met"),
        (Bar("at most", [1.06, 1.0, 1.3], 1.05), "not met"),
        (Bar("at least", [2.0, 3.0, 9.0], 3.0, at_least=True), "met"),
        (Bar("at least", [2.0, 2.9, 9.0], 3.0, at_least=True), "not met"),
        (Bar("no peer", [], 3.0, at_least=True), "not measured"),
    ],
)
def test_verdict_is_that_of_the_median(bar: Bar, verdict: str) -> None:
    assert bar.verdict == verdict


def test_the_report_states_command_commit_and_hardware() -> None:
    found = Findings(
        bars=[Bar("ours / floor", [1.0, 1.02, 1.1], 1.05), Bar("foolbox / ours", [], 1.3, at_least=True)],
        tables=[Table("Seconds", ("attack", "s"), [["ours", "1.5"]])],
        notes=["A note."],
    )
    assert render("attack", found, WHERE, "make bench", 12.4, 0.31) == (
        "# Attack\n\n"
        "`make bench`, commit abc1234, 2026-01-02, x86_64 2-core, torch 2.0. 12 s; load before it 0.3.\n\n"
        "Peers that are not installed and were left out: foolbox.\n\n"
        "## Bars\n\n"
        "| bar | median | range (rounds) | limit |  |\n|---|---|---|---|---|\n"
        "| ours / floor | 1.02 | 1 to 1.1 (3) | ≤ 1.05 | met |\n"
        "| foolbox / ours | – | – | ≥ 1.3 | not measured |\n\n"
        "## Seconds\n\n| attack | s |\n|---|---|\n| ours | 1.5 |\n\n"
        "A note.\n"
    )


def test_plot_of_growth(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "growth.png"
    assert plot([Curve("N", "s", {"measured": [(1, 2), (2, 3)], "model": [(1, 2), (2, 3)]})], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not plot([], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_command_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATAMERGE_DATA", raising=False)
    threads = torch.get_num_threads()
    try:
        arguments = ["--quick", "--theme", "storage", "--results", str(tmp_path)]
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0
    assert "not measured" in result.output
    [report] = tmp_path.glob("storage_*.md")
    assert "DATAMERGE_DATA is not set" in report.read_text()
