"""Results for people (a table) and for programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from datamerge.evaluation.config import EvaluateConfig
from datamerge.evaluation.results import Evaluation

# Of a pipe or file: it has no edge to wrap at.
NO_TERMINAL_WIDTH = 200
MISSING = "–"


def to_json(config: EvaluateConfig, results: Sequence[Evaluation]) -> str:
    """The settings and all results as one JSON object."""
    content = {
        "config": config.model_dump(mode="json"),
        "evaluations": [result.model_dump(mode="json") for result in results],
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def open_console() -> Console:
    """What prints tables on stdout."""
    console = Console()
    return console if console.is_terminal else Console(width=NO_TERMINAL_WIDTH)


def print_table(results: Sequence[Evaluation]) -> None:
    """One row per run on stdout."""
    console = open_console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("arm", "run"):
        table.add_column(header, overflow="fold")
    for header in (
        "loss\nclean",
        "loss\nadv.",
        "accuracy %\nclean",
        "accuracy %\nrobust",
        "images",
        "time",
        "training\ntime",
        "training\nread",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        table.add_row(*_cells(result))
    console.print(table)
    first = results[0]
    attack = (
        f"loss: squared distance to the original encoder's embedding. Attack: PGD, epsilon {first.epsilon}, "
        f"{first.steps} steps of {first.step_size}, seed {first.seed}. Images: {first.data}"
    )
    console.print(attack, markup=False, highlight=False)


def _cells(result: Evaluation) -> tuple[str, ...]:
    return (
        result.arm,
        short_name(result.run),
        f"{result.embedding_loss_clean:.4g}",
        f"{result.embedding_loss_adversarial:.4g}",
        _percent(result.accuracy_clean, result.accuracy_clean_se),
        _percent(result.accuracy_robust, result.accuracy_robust_se),
        str(result.images),
        format_seconds(result.seconds),
        format_seconds(result.train_seconds),
        _bytes(result.artifact_bytes),
    )


def short_name(run: str) -> str:
    """A run without the folders in front, which are alike in every row."""
    if Path(run).expanduser().is_dir():
        return Path(run).expanduser().absolute().name
    network, at, checkpoint = run.partition("@")
    return f"{network}{at}{Path(checkpoint).name}"


def _percent(rate: float | None, error: float | None) -> str:
    return MISSING if rate is None or error is None else f"{100 * rate:.1f} ± {100 * error:.1f}"


def format_seconds(seconds: float | None) -> str:
    """A duration to read."""
    if seconds is None:
        return MISSING
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _bytes(count: int | None) -> str:
    if count is None:
        return MISSING
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
