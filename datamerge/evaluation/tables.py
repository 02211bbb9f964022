"""Results of all parts as one table: on the terminal, as JSON for programs, as Markdown for papers, in notebooks.

One row per arm. The columns of the paper are COCO clean, COCO adv., VQAv2 clean and VQAv2 adv.; the scores of the
other parts precede them, and the cost follows.
"""

from __future__ import annotations

import html
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from datamerge.evaluation.results import ArmResult, Score
from datamerge.evaluation.store import read_object
from datamerge.runtime import pages
from storage_schemas import DatamergeError
from storage_schemas.access.local_paths import user_path

PARTS = ("pgd", "zero-shot", "embedding", "captions", "vqa")
RESULTS = "results.json"
MISSING = "–"
NAMES = 2  # columns at the left, which name a row
# Width of a table in a pipe or file, unless COLUMNS is set.
NO_TERMINAL_WIDTH = 200
ANY_WIDTH = 10_000
LEAST_NAME = 8  # letters of a name before it is folded
NOTE = (
    "± is the standard error of the mean over images; [low, high] its 95 % interval (Wilson for rates, bootstrap "
    "over images for other means). Rows of one part saw the same images."
)

# The parts of a row, by name.
Row = Mapping[str, ArmResult]


def read_results(file: Path) -> list[ArmResult]:
    """The results in a `results.json`; none if there is no such file.

    Raises:
        DatamergeError: the file holds something else.
    """
    if not file.is_file():
        return []
    try:
        return [ArmResult.model_validate(entry) for entry in read_object(file)["arms"]]
    except (ValueError, KeyError, TypeError, ValidationError):
        raise DatamergeError(
            f"{file}: expected results of `datamerge evaluate`; remove it to write it again"
        ) from None


def table_rows(results: Sequence[ArmResult]) -> list[Row]:
    """One row per run, in the order of their first appearance."""
    rows: dict[str, dict[str, ArmResult]] = {}
    for result in results:
        rows.setdefault(result.run, {})[result.part] = result
    return list(rows.values())


class Results(list[ArmResult]):
    """Results in the order of the runs, which Python and notebooks show as a table."""

    def __repr__(self) -> str:
        console = Console(file=io.StringIO(), width=NO_TERMINAL_WIDTH)
        with console.capture() as shown:
            _print(table_rows(self), console)
        return shown.get().strip("\n")

    def _repr_html_(self) -> str:
        rows = table_rows(self)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in table_notes(rows))
        return pages.table_html(html_table(rows)) + notes


def print_rows(rows: Sequence[Row]) -> None:
    """The table on stdout."""
    console = Console()
    edge = console.is_terminal or "COLUMNS" in os.environ
    _print(rows, console if edge else Console(width=NO_TERMINAL_WIDTH))


def _print(rows: Sequence[Row], console: Console) -> None:
    for table in _tables(_grid(rows), console):
        console.print(table)
    for text in (*table_notes(rows), *(f"WARNING: {message}" for message in table_warnings(rows))):
        console.print(text, markup=False, highlight=False)


def _tables(grid: Sequence[Sequence[str]], console: Console) -> list[Table]:
    """The grid as one table, or as several below each other where one would be wider than the console.

    Each table names its rows, folded where there is too little room. Tables after the first one name the arms only,
    if these differ.
    """
    columns = list(range(len(grid[0])))
    whole = _table(grid, columns, None)
    if _fits(whole, console):
        return [whole]
    most = max(LEAST_NAME, console.width // 4)
    arms = [line[0] for line in grid]
    repeated = [0] if len(set(arms)) == len(arms) else list(range(NAMES))
    tables: list[Table] = []
    names, values = list(range(NAMES)), list[int]()
    for column in columns[NAMES:]:
        if values and not _fits(_table(grid, [*names, *values, column], most), console):
            tables.append(_table(grid, [*names, *values], most))
            names, values = repeated, []
        values.append(column)
    return [*tables, _table(grid, [*names, *values], most)]


def _fits(table: Table, console: Console) -> bool:
    room = console.options.update(width=ANY_WIDTH)  # a measurement never exceeds the width it is given
    return console.measure(table, options=room).maximum <= console.width


def _table(grid: Sequence[Sequence[str]], columns: Sequence[int], most: int | None) -> Table:
    """Some columns; names are folded to lines of `most` letters."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position in columns:
        name = position < NAMES
        table.add_column(
            Text(grid[0][position]),
            overflow="fold",
            justify="left" if name else "right",
            max_width=most if name else None,
        )
    for line in grid[1:]:
        table.add_row(*(Text(line[position]) for position in columns))
    return table


def to_json(results: Sequence[ArmResult]) -> str:
    """All results as one JSON object."""
    content = {"arms": [result.model_dump(mode="json") for result in results]}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_markdown(rows: Sequence[Row]) -> str:
    """The table as GitHub's Markdown."""
    header, *cells = _grid(rows, interval=True)
    rule = ["---" if position < NAMES else "---:" for position in range(len(header))]
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(line)} |" for line in cells)]
    lines += ["", " ".join((NOTE, *table_notes(rows))), *(f"\n**Warning:** {text}" for text in table_warnings(rows))]
    return "\n".join(lines) + "\n"


def html_table(rows: Sequence[Row], interval: bool = False) -> pages.Table:
    """The table for a page; intervals are in a second line of their cells."""
    header, *cells = _grid(rows, interval)
    return pages.Table(header, [[cell.replace(" [", "\n[") for cell in line] for line in cells], NAMES)


def _grid(rows: Sequence[Row], interval: bool = False) -> list[list[str]]:
    """The header and a line per row, as text; columns of the training's cost only if a row has one."""
    names = (score.name for part in PARTS for row in rows if part in row for score in row[part].scores)
    columns = list(dict.fromkeys(names))
    trained = any(result.training is not None for row in rows for result in row.values())
    header = ["arm", "run", *columns, "images", "time", *(["training time", "training read"] if trained else [])]
    return [header, *(_cells(row, columns, interval)[: len(header)] for row in rows)]


def _cells(row: Row, columns: Sequence[str], interval: bool) -> list[str]:
    first = next(iter(row.values()))
    scores = {score.name: score for result in row.values() for score in result.scores}
    cost = first.training
    return [
        first.arm,
        short_name(first.run),
        *(_format(scores[name], interval) if name in scores else MISSING for name in columns),
        "/".join(str(count) for count in dict.fromkeys(result.images for result in row.values())),
        _seconds(sum(result.seconds for result in row.values())),
        MISSING if cost is None else _seconds(cost.seconds),
        MISSING if cost is None else _bytes(cost.bytes),
    ]


def short_name(run: str) -> str:
    """A run without the folders in front of its name."""
    if user_path(run).is_dir():
        return user_path(run).absolute().name
    network, at, checkpoint = run.partition("@")
    return f"{network}{at}{Path(checkpoint).name}"


def _format(score: Score, interval: bool) -> str:
    """The score with as many digits as its error justifies, at least one after the point."""
    scale = score.error or abs(score.value) / 100
    digits = min(6, max(1, -math.floor(math.log10(scale)))) if scale else 1
    text = f"{score.value:.{digits}f}" + ("" if score.error is None else f" ± {score.error:.{digits}f}")
    return f"{text} [{score.low:.{digits}f}, {score.high:.{digits}f}]" if interval else text


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def table_notes(rows: Sequence[Row]) -> list[str]:
    """What the scores are, a line for each part that says so."""
    return list(dict.fromkeys(result.note for row in rows for result in row.values() if result.note))


def table_warnings(rows: Sequence[Row]) -> list[str]:
    """What a reader must know before trusting the scores, with the arm and part."""
    return [
        f"{result.arm}, {result.part}: {message}"
        for row in rows
        for result in row.values()
        for message in result.warnings
    ]
