"""Scores against the radius of the attack, one chart for each part and measure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from datamerge.evaluation.results import ArmResult, Score
from datamerge.evaluation.tables import PARTS, Row, short_name
from datamerge.runtime.pages import Chart
from datamerge.runtime.pages.charts import Series, draw

# How columns are named: a measure, and what was done to the images.
COLUMN = re.compile(r"(?P<measure>.+) (?P<images>clean|adv\.|robust|ε=(?P<radius>.+))")
UNITS = {"top-1": "%", "accuracy": "%", "COCO": "CIDEr × 100", "VQAv2": "accuracy, %"}

# Radius as the user wrote it, and the score at it.
Point = tuple[str, Score]


def curves(rows: Sequence[Row]) -> list[Chart]:
    """A chart for each measure that was taken at two radii or more; none where matplotlib is missing."""
    charts = []
    names = row_names(rows)
    for part in PARTS:
        taken = [(name, row[part]) for name, row in zip(names, rows, strict=True) if part in row]
        measures = dict.fromkeys(found["measure"] for _, result in taken for found in _columns(result))
        for measure in measures:
            points = {name: _points(result, measure) for name, result in taken}
            radii = {radius: radius for one in points.values() for radius, _ in one}
            if len(radii) > 1:
                norm = str(taken[0][1].settings.get("norm", "linf")).replace("linf", "ℓ∞").replace("l2", "ℓ2")
                unit = UNITS.get(measure)
                svg = draw(
                    [_series(name, one) for name, one in points.items() if one],
                    x_label=f"radius of the attack ε ({norm})",
                    y_label=measure if unit is None else f"{measure}, {unit}",
                    x_ticks={float(Fraction(radius)): radius for radius in radii},
                )
                if svg is not None:
                    charts.append(Chart(svg, f"{part}: {measure}, clean (ε = 0) and under attack; 95 % intervals."))
    return charts


def row_names(rows: Sequence[Row]) -> list[str]:
    """The arm of each row, with its run where several rows have one arm."""
    firsts = [next(iter(row.values())) for row in rows]
    arms = [first.arm for first in firsts]
    return [first.arm if arms.count(first.arm) == 1 else f"{first.arm}, {short_name(first.run)}" for first in firsts]


def _columns(result: ArmResult) -> list[re.Match[str]]:
    return [found for score in result.scores if (found := COLUMN.fullmatch(score.name))]


def _points(result: ArmResult, measure: str) -> list[Point]:
    """The scores of a measure with their radii, smallest first; other parts than those of APGD have one radius."""
    points = [
        ("0" if found["images"] == "clean" else found["radius"] or str(result.settings["epsilon"]), score)
        for score in result.scores
        if (found := COLUMN.fullmatch(score.name)) and found["measure"] == measure
    ]
    return sorted(points, key=lambda point: Fraction(point[0]))


def _series(name: str, points: Sequence[Point]) -> Series:
    return Series(
        name,
        [float(Fraction(radius)) for radius, _ in points],
        [score.value for _, score in points],
        [score.low for _, score in points],
        [score.high for _, score in points],
    )
