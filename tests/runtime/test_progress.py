"""Progress in a log file: a line every ten seconds and one at the end; rates leave out the work of earlier runs."""

from __future__ import annotations

import re

import pytest

from datamerge.runtime import Progress, progress


class Clock:
    """Stands in for the `time` module."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATAMERGE_QUIET", "1")
    with Progress("merge", 2, "groups") as bar:
        bar.advance(2)
    assert capsys.readouterr().err == ""


def test_logs_have_a_line_every_ten_seconds_and_one_at_the_end(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with Progress("merge", 100, "groups") as bar:
        for second in range(1, 26):
            clock.now = 100.0 + second
            bar.advance(4, f"loss {second}")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "merge: 40/100 groups, 4.0 groups/s, 15 s left  loss 10",
        "merge: 80/100 groups, 4.0 groups/s, 5 s left  loss 20",
        "merge: 100/100 groups, 4.0 groups/s, 0 s left  loss 25",
    ]


def test_work_of_an_earlier_run_is_done_but_not_part_of_the_rate(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with Progress("train", 1000, "steps", done=900) as bar:
        clock.now += 10.0
        bar.advance(50)
    assert capsys.readouterr().err == "train: 950/1000 steps, 5.0 steps/s, 10 s left\n"


def test_lines_have_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("merge", 3, "groups") as bar:
        for _ in range(3):
            bar.advance(1)
    line = capsys.readouterr().err
    assert re.fullmatch(r"merge: 3/3 groups, [\d.]+ groups/s, 0 s left\n", line)


def test_an_exception_passes_through() -> None:
    with pytest.raises(ZeroDivisionError), Progress("merge", 3, "groups"):
        raise ZeroDivisionError
