"""The demo's report as one page: the merged groups, the trainings, and the scores with what they mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.filesize import decimal as human_bytes

from datamerge.artifacts import inspect
from datamerge.evaluation.curves import row_names
from datamerge.evaluation.reports import arm_pictures, provenance, scores
from datamerge.evaluation.results import ArmResult
from datamerge.evaluation.tables import table_rows
from datamerge.runtime.pages import Chart, Section, render
from datamerge.runtime.pages.charts import Series, draw
from datamerge.runtime.pages.groups import group_strips
from storage_schemas import open_artifact

REPORT = "report.html"
GROUPS = 4
LEAD = (
    "Adversarial images of real digits were made once and merged into groups. Each arm fine-tuned an encoder on the "
    "groups. All encoders were then attacked on held-out digits."
)
COLUMNS = (
    "loss clean is the mean of ‖f(x) − f₀(x)‖² over the test digits x: the squared distance by which fine-tuning "
    "moved the embedding of a clean image. f is the encoder of the arm and f₀ the encoder that it started from. The "
    "row w/o AT is f₀ itself and has 0.",
    "loss adv. is the mean of ‖f(x′) − f₀(x)‖². PGD searches the ball around x for an x′ that makes this distance "
    "large.",
    "accuracy clean is the share of digits that the head behind the encoder classifies correctly. The head was "
    "trained with f₀ on clean digits and is not trained again.",
    "accuracy robust is the share that is classified correctly both clean and after a second attack, which raises "
    "the cross entropy of the head instead of the distance.",
)
DISAGREEMENT = (
    "Why the loss under attack can rise while the accuracy under attack rises: each of the two has its own attack "
    "and its own measure. The loss counts a displacement of the embedding in every direction, by its square. The "
    "accuracy changes only when the logit of another class exceeds that of the right one; a displacement that the "
    "head ignores, or that raises the right class, costs nothing. The stored images were made by attacks on f₀. An "
    "arm that trains on them can become more sensitive in directions that these images do not contain, and the new "
    "attack on the distance searches for such directions. Its embeddings of clean images have moved too, and this "
    "displacement is part of the loss under attack. An arm that attacks its own encoder at every step, as FARE "
    "does, trains against the loss under attack itself."
)


def write_report(root: Path, artifact: str, runs: Sequence[str], arms: Sequence[ArmResult]) -> Path:
    """Write `report.html` into the demo's folder, from what the commands wrote.

    Args:
        root: the demo's folder.
        artifact: the merged groups.
        runs: folders of the trainings in `root`.
        arms: results of `datamerge evaluate`, the encoder before training first.
    """
    rows = table_rows(arms)
    groups = open_artifact(artifact)
    facts = inspect(groups)
    stored = f"{facts['groups']:,} groups of {facts['members']['max']} members are {human_bytes(facts['bytes'])}."
    sections = [
        Section(
            "What was merged",
            text=["One row is one group: a clean digit, adversarial images of it, and the stored moments.", stored],
            strips=group_strips(groups, GROUPS),
        ),
        Section(
            "Training",
            text=[
                "The loss of each arm on the groups it trains on. Arms minimise different losses, so that their "
                "levels do not compare."
            ],
            charts=_curves(root, runs),
        ),
        scores(rows),
        Section("What the columns mean", text=[*COLUMNS, DISAGREEMENT, *_seen(arms, row_names(rows))]),
        *arm_pictures(rows),
        provenance(rows),
    ]
    path = root / REPORT
    path.write_text(render("Demo: robust digits", LEAD, sections), "utf-8")
    return path


def _curves(root: Path, runs: Sequence[str]) -> list[Chart]:
    logs = [[json.loads(line) for line in (root / run / "log.jsonl").read_text("utf-8").splitlines()] for run in runs]
    series = [
        Series(run, [line["step"] for line in log], [line["loss"] for line in log])
        for run, log in zip(runs, logs, strict=True)
    ]
    svg = draw(series, x_label="step", y_label="training loss", logarithmic=True)
    return [] if svg is None else [Chart(svg, "Training loss on a logarithmic scale.")]


def _seen(arms: Sequence[ArmResult], names: Sequence[str]) -> list[str]:
    """The arms of this run whose accuracy and loss under attack are both above those of the first row."""
    first, *others = arms
    loss, accuracy = (first.score(name).value for name in ("loss adv.", "accuracy robust"))
    found = [
        f"{name} ({arm.score('loss adv.').value:.0f} and {arm.score('accuracy robust').value:.1f} %)"
        for name, arm in zip(names[1:], others, strict=True)
        if arm.score("loss adv.").value > loss and arm.score("accuracy robust").value > accuracy
    ]
    if not found:
        return []
    return [
        f"Here both are higher than those of {first.arm} ({loss:.0f} and {accuracy:.1f} %) for {', '.join(found)}."
    ]
