"""The reports of an output folder: `results.json`, `report.md`, and the page `report.html`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from datamerge.evaluation.curves import curves, row_names
from datamerge.evaluation.pictures import strips
from datamerge.evaluation.results import ArmResult
from datamerge.evaluation.store import write_result
from datamerge.evaluation.tables import (
    NOTE,
    PARTS,
    RESULTS,
    Row,
    html_table,
    read_results,
    table_notes,
    table_rows,
    table_warnings,
    to_json,
    to_markdown,
)
from datamerge.runtime.pages import Folded, Section, Table, render
from datamerge.runtime.pages.charts import WITHOUT_MATPLOTLIB
from storage_schemas import Location
from storage_schemas.access.local_paths import user_path
from storage_schemas.schema.provenance import own_version


def write_reports(output: str, part: str, results: Sequence[ArmResult]) -> list[Row]:
    """Store the results of one part and rebuild the reports of all parts in the folder; returns the table's rows.

    Arms that an earlier call evaluated into this folder stay in the reports.

    Raises:
        DatamergeError: results of an earlier call that cannot be read, or a folder that cannot be written.
    """
    folder = user_path(output).absolute()
    location = Location(folder)
    again = {result.run for result in results}
    kept = [result for result in read_results(folder / part / RESULTS) if result.run not in again]
    write_result(location, f"{part}/{RESULTS}", to_json([*kept, *results]).encode())
    everything = [result for name in PARTS for result in read_results(folder / name / RESULTS)]
    write_result(location, RESULTS, to_json(everything).encode())
    rows = table_rows(everything)
    write_result(location, "report.md", to_markdown(rows).encode())
    write_result(location, "report.html", to_html(rows).encode())
    return rows


def to_html(rows: Sequence[Row]) -> str:
    """The page: table, curves, pictures, settings."""
    parts = [part for part in PARTS if any(part in row for row in rows)]
    count = len(rows)
    lead = f"{count} encoder{'' if count == 1 else 's'} on raw images, clean and under attack: {', '.join(parts)}."
    return render("Evaluation", lead, [scores(rows), *arm_pictures(rows), provenance(rows)])


def scores(rows: Sequence[Row]) -> Section:
    """The table with its intervals, and the curves."""
    charts = curves(rows)
    return Section(
        "Scores",
        text=[] if charts else [WITHOUT_MATPLOTLIB],
        warnings=[f"Warning: {text}" for text in table_warnings(rows)],
        table=html_table(rows, interval=True),
        notes=[NOTE, *table_notes(rows)],
        charts=charts,
    )


def arm_pictures(rows: Sequence[Row]) -> list[Section]:
    """What the attacks did, arm by arm."""
    return [
        Section(f"{name}: {result.part}", strips=found)
        for name, row in zip(row_names(rows), rows, strict=True)
        for result in row.values()
        if (found := strips(result))
    ]


def provenance(rows: Sequence[Row]) -> Section:
    """Everything that determines the scores, arm by arm."""
    folded = []
    encoders = []
    for name, row in zip(row_names(rows), rows, strict=True):
        first = next(iter(row.values()))
        trained = "" if first.training is None else first.training.artifact
        encoders.append([name, first.encoder, trained, first.encoder_sha256[:12]])
        for result in row.values():
            facts = result.model_dump(mode="json", exclude={"scores", "note", "warnings"})
            facts["details"].pop("pictures", None)
            folded.append(Folded(f"{name}: {result.part}", json.dumps(facts, indent=1, ensure_ascii=False)))
    return Section(
        "Settings and provenance",
        table=Table(["arm", "encoder", "trained on", "SHA-256 of the weights"], encoders, names=4),
        notes=[f"Written by datamerge {own_version()}."],
        folded=folded,
    )
