"""Results of all parts as one table: JSON for programs, Markdown for papers, HTML with pictures for eyes.

One row per arm, the columns of the paper: COCO clean, COCO adv., VQAv2 clean, VQAv2 adv., before them those of the
other parts.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError
from rich import box
from rich.table import Table

from datamerge.evaluation.pictures import picture_section
from datamerge.evaluation.report import MISSING, format_seconds, open_console, short_name
from datamerge.evaluation.results import ArmResult, Score
from datamerge.evaluation.store import write_result
from storage_schemas import DatamergeError, Location, read_json

PARTS = ("zero-shot", "embedding", "captions", "vqa")
RESULTS = "results.json"
NOTE = (
    "± is the standard error of the mean over images; [low, high] its 95 % interval (Wilson for rates, bootstrap "
    "over images for other means). Rows of one part saw the same images."
)

# The parts of a row, by name.
Row = Mapping[str, ArmResult]


def write_reports(output: str, part: str, results: Sequence[ArmResult]) -> list[Row]:
    """Store the results of one part and rebuild the reports of all parts in the folder; returns the table's rows.

    Arms that were evaluated into this folder before and not again stay in it.

    Raises:
        DatamergeError: results of an earlier call that cannot be read, or a folder that takes no more.
    """
    folder = Path(output).expanduser().absolute()
    location = Location(folder)
    again = {result.run for result in results}
    kept = [result for result in _read(folder / part / RESULTS) if result.run not in again]
    _write(location, f"{part}/{RESULTS}", [*kept, *results])
    everything = [result for name in PARTS for result in _read(folder / name / RESULTS)]
    _write(location, RESULTS, everything)
    rows = table_rows(everything)
    write_result(location, "report.md", to_markdown(rows).encode())
    write_result(location, "report.html", to_html(rows).encode())
    return rows


def table_rows(results: Sequence[ArmResult]) -> list[Row]:
    """One row per run, in the order of their first appearance."""
    rows: dict[str, dict[str, ArmResult]] = {}
    for result in results:
        rows.setdefault(result.run, {})[result.part] = result
    return list(rows.values())


def print_rows(rows: Sequence[Row]) -> None:
    """The table on stdout."""
    console = open_console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("arm", "run"):
        table.add_column(name, overflow="fold")
    columns = _columns(rows)
    for name in (*columns, "images", "time"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*_cells(row, columns))
    console.print(table)
    for message in _warnings(rows):
        console.print(f"WARNING: {message}", markup=False, highlight=False)


def to_markdown(rows: Sequence[Row]) -> str:
    """The table as GitHub's Markdown."""
    columns = _columns(rows)
    header = ["arm", "run", *columns, "images", "time"]
    lines = [f"| {' | '.join(header)} |", "|---|---|" + "---:|" * (len(header) - 2)]
    lines += [f"| {' | '.join(_cells(row, columns, interval=True))} |" for row in rows]
    lines += ["", NOTE, *(f"\n**Warning:** {message}" for message in _warnings(rows))]
    return "\n".join(lines) + "\n"


def to_html(rows: Sequence[Row]) -> str:
    """One page that needs no other file."""
    columns = _columns(rows)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("arm", "run", *columns, "images", "time"))
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row, columns, interval=True)) + "</tr>"
        for row in rows
    )
    warnings = "".join(f"<p class='warning'>Warning: {html.escape(message)}</p>" for message in _warnings(rows))
    pictures = "\n".join(picture_section(result) for row in rows for result in row.values())
    settings = "\n".join(
        f"<h3>{html.escape(result.arm)}, {result.part}</h3><pre>"
        f"{html.escape(json.dumps({**result.settings, 'encoder_sha256': result.encoder_sha256}, indent=1))}</pre>"
        for row in rows
        for result in row.values()
    )
    return _PAGE.format(head=head, body=body, note=html.escape(NOTE), warnings=warnings) + (
        f"{pictures}\n<details><summary>Settings</summary>{settings}</details>\n</body></html>\n"
    )


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>datamerge evaluation</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; color: #222; }}
table {{ border-collapse: collapse; }} th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #ddd; }}
td:nth-child(n+3) {{ text-align: right; font-variant-numeric: tabular-nums; }} .warning {{ color: #a40; }}
figure {{ display: inline-block; margin: .5rem 1.5rem 1rem 0; vertical-align: top; width: 36rem; }}
.row {{ display: flex; gap: .3rem; }} .row div {{ flex: 1; text-align: center; }} .row img {{ width: 100%; }}
small {{ color: #666; }} pre {{ overflow-x: auto; background: #f6f6f6; }}
</style></head><body>
<h1>Evaluation</h1>
<table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table>
<p>{note}</p>{warnings}
"""


def _columns(rows: Sequence[Row]) -> list[str]:
    names = (score.name for part in PARTS for row in rows if part in row for score in row[part].scores)
    return list(dict.fromkeys(names))


def _cells(row: Row, columns: Sequence[str], interval: bool = False) -> list[str]:
    first = next(iter(row.values()))
    scores = {score.name: score for result in row.values() for score in result.scores}
    return [
        first.arm,
        short_name(first.run),
        *(_format(scores[name], interval) if name in scores else MISSING for name in columns),
        "/".join(str(count) for count in dict.fromkeys(result.images for result in row.values())),
        format_seconds(sum(result.seconds for result in row.values())),
    ]


def _format(score: Score, interval: bool) -> str:
    text = f"{score.value:.1f}" if score.error is None else f"{score.value:.1f} ± {score.error:.1f}"
    return f"{text} [{score.low:.1f}, {score.high:.1f}]" if interval else text


def _warnings(rows: Sequence[Row]) -> list[str]:
    return [
        f"{result.arm}, {result.part}: {message}"
        for row in rows
        for result in row.values()
        for message in result.warnings
    ]


def _read(file: Path) -> list[ArmResult]:
    if not file.is_file():
        return []
    try:
        content = read_json(file.read_bytes())
        return [ArmResult.model_validate(entry) for entry in content["arms"]]
    except (ValueError, KeyError, TypeError, ValidationError):
        raise DatamergeError(
            f"{file}: expected results of `datamerge evaluate`; remove it to write it again"
        ) from None


def _write(location: Location, name: str, results: Sequence[ArmResult]) -> None:
    content = {"arms": [result.model_dump(mode="json") for result in results]}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_result(location, name, text.encode() + b"\n")
