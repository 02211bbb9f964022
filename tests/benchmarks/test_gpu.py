"""A rehearsal of `make gpu` without a GPU: every part on tiny networks."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from benchmarks.gpu import _run, main
from benchmarks.gpu_merge import STAGES
from benchmarks.gpu_parts import PARTS
from benchmarks.gpu_rows import RATES, Row, busy, launches, share, teraflops

PEAKS = {"bfloat16": 4.0, "tf32": 2.0, "float32": 1.0}


@cache
def rehearsed(name: str) -> list[Row]:
    """The rows of a part in a rehearsal."""
    threads = torch.get_num_threads()
    try:
        return list(PARTS[name].work(True, PEAKS))
    finally:
        torch.set_num_threads(threads)


# Inductor's imports warn.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize("name", PARTS)
def test_every_part_measures_something(name: str) -> None:
    rows = rehearsed(name)
    assert len({row.what for row in rows}) == len(rows) >= 2
    for row in rows:
        assert row.part == name
        assert not row.failed, row.what
        assert row.ms is not None
        assert row.ms > 0
        assert all(math.isfinite(value) for value in (row.ms, row.share or 0, row.rate or 0))
        assert Row.from_json(row.to_json()) == row
    # Attacks and steps of training are compared with the peak of the GPU.
    assert any(row.share is not None for row in rows) == (name not in (RATES, "merge", "feed", "exchange"))


def test_the_stages_of_a_batch_add_up() -> None:
    """Every stage is measured, and their times sum to the whole."""
    rows = [row for row in rehearsed("merge") if row.what.startswith("one batch")]
    whole, *parts = [row.ms or 0 for row in rows]
    assert all(any(stage.what in row.what for row in rows) for stage in STAGES)
    assert sum(parts) == pytest.approx(whole)
    assert min(parts) > 0


def test_kernels_are_counted() -> None:
    numbers, cpu = torch.ones(4), torch.device("cpu")
    once = launches(lambda: numbers + 1, cpu)
    assert launches(lambda: [numbers + 1, numbers + 1, numbers + 1], cpu) == 3 * once > 0
    assert 0 < busy(lambda: torch.ones(300, 300) @ torch.ones(300, 300), cpu) <= 1


def test_the_parts_fit_into_eight_minutes() -> None:
    """Together with the tests before them, and if every part takes its whole limit."""
    script = (Path(__file__).parents[2] / ".ci" / "gpu.sh").read_text()
    tests, figures = (int(seconds) for seconds in re.findall(r'^timeout .*?(\d+) "', script, re.MULTILINE))
    (seconds,) = (option.get_default(click.Context(main)) for option in main.params if option.name == "seconds")
    assert sum(part.limit for part in PARTS.values()) <= float(str(seconds)) < figures
    assert tests + figures <= 8 * 60


def test_operations_are_counted_through_both_passes() -> None:
    """Two products of a layer of 6 × 4 weights on 5 rows: forward, and back to the rows."""
    weight, rows = torch.randn(6, 4), torch.randn(5, 4, requires_grad=True)

    def work() -> None:
        torch.autograd.grad((rows @ weight.T).sum(), rows)

    assert teraflops(work) * 1e12 == pytest.approx(2 * 2 * 5 * 4 * 6)
    assert share(500.0, 1.0, PEAKS, "bfloat16") == pytest.approx(0.5)
    assert share(500.0, 1.0, {}, "bfloat16") is None


def test_a_part_that_fails_leaves_a_row_and_the_next_one_starts(tmp_path: Path) -> None:
    """The report is written with both."""
    (tmp_path / "transformers.py").write_text("raise RuntimeError('broken here')")  # which LLaVA's part imports
    results = tmp_path / "results"
    result = CliRunner().invoke(
        main,
        ["llava", RATES, "--rehearse", "--seconds", "900", "--output", str(results)],
        env={"PYTHONPATH": str(tmp_path)},
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    (report,) = results.iterdir()
    assert report.name.startswith("gpu_")
    rows = [line.strip("| ").split(" | ") for line in report.read_text().splitlines()]
    named = [tuple(row[:2]) for row in rows if row[0] in ("llava", RATES)]
    assert named[:4] == [
        ("llava", "failed: RuntimeError: broken here"),
        *((RATES, precision) for precision in ("bfloat16", "tf32", "float32")),
    ]
    assert result.output.splitlines()[-1].endswith("7 rows, 1 of them failures")


def test_a_part_that_hangs_leaves_a_row_and_ends(capfd: pytest.CaptureFixture[str]) -> None:
    (row,) = _run("train", True, [], 0.01)
    assert row.failed
    assert row.part == "train"
    assert "ended after 0 s" in row.what
    assert "ended after 0 s" in capfd.readouterr().out


def test_without_time_left_no_part_starts(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--rehearse", "--seconds", "0", "--output", str(tmp_path)])
    assert result.exit_code == 0
    assert f"{len(PARTS)} rows, {len(PARTS)} of them failures" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_reported(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "no GPU" in result.output
    assert not list(tmp_path.iterdir())
