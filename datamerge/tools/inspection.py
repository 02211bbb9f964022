"""`datamerge inspect` of artifacts and sources, `datamerge preview` and `datamerge verify`."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal as human_bytes
from rich.table import Table
from rich.text import Text

from datamerge import artifacts as library
from datamerge.packages import load
from datamerge.runtime import load_settings
from datamerge.runtime.options import HELP_FLAGS, options
from datamerge.runtime.pages import Section, render
from datamerge.runtime.pages import Table as PageTable
from datamerge.runtime.pages.groups import group_strips
from datamerge.tools.source_inspection import SourceSettings
from datamerge.tools.source_inspection import rows as source_rows
from storage_schemas import ConfigError, Location, NotAnArtifact, UserError, open_artifact, printable
from storage_schemas.access.redaction import split_query
from storage_schemas.card.contact_sheet import ROWS
from storage_schemas.card.dataset_card import recorded_preprocessing
from storage_schemas.schema.manifest import MANIFEST
from storage_schemas.verify import Report

SHOWN_PROBLEMS = 8  # per file
# Suffix of a picture → format of Pillow; without a suffix, PNG.
PICTURES = {"": "PNG", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
PAGE = ".html"
LEGEND = (
    "One row is one group. Mean and variance are those of its members; the variance is averaged over the channels. "
    "The difference is multiplied so that its largest value just fits the range, and grey stands for 0."
)


@click.command(context_settings=HELP_FLAGS)
@click.argument("artifact", required=False)
@click.option("--source", metavar="DATA", help="Raw images to inspect instead of an artifact, given as to merge.")
@options(SourceSettings)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(artifact: str | None, source: str | None, as_json: bool, **flags: Any) -> None:
    """Show what ARTIFACT holds: groups, bytes, encoding, ranges of its moments, provenance.

    With --source, show how merge would read raw images: kind, splits, classes, files left out, and the sizes, modes
    and EXIF orientations of some of the images. The other options, except --json, apply to --source only.

    \b
    datamerge inspect adv-2-255
    datamerge inspect s3://bucket/adv-2-255 --json | jq .provenance.encoder
    datamerge inspect --source photos/ --thumbnails some.png
    """
    if (artifact is None) == (source is None):
        raise click.UsageError("expected ARTIFACT or --source DATA, found " + ("both" if source else "neither"))
    settings = load_settings(SourceSettings, None, flags)
    if source is not None:
        inspect_source = load(
            "datamerge.sources.inspection", "inspect_source", extra="merge", needed_by="`datamerge inspect --source`"
        )
        facts = inspect_source(source, **settings.model_dump())
        rows = source_rows(facts)
    else:
        given = next((name for name, value in settings.model_dump().items() if value is not None), None)
        if given is not None:
            raise ConfigError(
                f"{given}: artifacts have no such setting; drop `{given}`, or name raw images with --source"
            )
        try:
            facts = library.inspect(str(artifact))
        except NotAnArtifact as error:
            if Location(str(artifact)).exists(MANIFEST):
                raise
            raise NotAnArtifact(f"{error}; raw images are shown by --source {artifact}") from None
        rows = _rows(facts)
    if as_json:
        click.echo(json.dumps(facts))
        return
    table = Table(title=_text(facts["url"]), show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(_text(name), _text(value))
    Console(highlight=False).print(table)


@click.command(context_settings=HELP_FLAGS)
@click.argument("artifact")
@click.option(
    "-o",
    "--output",
    default="preview.png",
    show_default=True,
    help="Picture to write: .png, .jpg or .webp; .html for a page with captions and provenance.",
)
@click.option("--groups", type=click.IntRange(1, 64), help="Groups to draw. [8]")
@click.option("--key", "keys", multiple=True, help="Draw the group with this key; may be repeated.")
def preview(artifact: str, output: str, groups: int | None, keys: tuple[str, ...]) -> None:
    """Draw a contact sheet of ARTIFACT: clean, members, mean, amplified difference, variance.

    \b
    datamerge preview adv-2-255 -o preview.html
    datamerge preview adv-2-255 --key 000017 --key 000042 -o two.png
    """
    if keys and groups is not None:
        raise ConfigError(f"groups: those of the keys are drawn; drop `groups={groups}` or the keys", about="groups")
    suffix = PurePosixPath(split_query(output)[0]).suffix.lower()
    if suffix not in (*PICTURES, PAGE):
        shown = ", ".join(filter(None, (*PICTURES, PAGE)))
        raise ConfigError(
            f"output: expected a file that ends in {shown}, found {output!r}; rename it", about="output"
        )
    if suffix == PAGE:
        content = _page(artifact, groups or ROWS, keys).encode()
    else:
        buffer = io.BytesIO()
        library.preview(artifact, groups=groups or ROWS, keys=keys).convert("RGB").save(buffer, PICTURES[suffix])
        content = buffer.getvalue()
    folder, name = Location(output).split()
    try:
        folder.write(name, content)
    except IsADirectoryError:
        raise UserError(f"{output}: expected a file to write, found a folder; name a file in it") from None
    click.echo(f"{output}: {human_bytes(len(content))}")


def _page(artifact: str, groups: int, keys: Sequence[str]) -> str:
    """The groups and what `datamerge inspect` shows of the artifact, as one page."""
    opened = open_artifact(artifact, partial=True)
    facts = library.inspect(opened)
    counts = dict.fromkeys((facts["members"]["min"], facts["members"]["max"]))
    return render(
        printable(PurePosixPath(facts["url"]).name),
        f"{facts['groups']:,} merged groups of {' to '.join(map(str, counts))} images.",
        [
            Section("Groups", text=[LEGEND], strips=group_strips(opened, groups, keys)),
            Section("Contents and provenance", table=PageTable([], _rows(facts), names=2)),
        ],
    )


@click.command(context_settings=HELP_FLAGS)
@click.argument("artifact")
@click.option("--fix", "repair", is_flag=True, help="Remove the commits of damaged shards.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def verify(artifact: str, repair: bool, as_json: bool) -> None:
    """Compare every file of ARTIFACT with the committed sizes and hashes.

    The exit code is 0 if all files are sound, 1 if any is damaged (also after --fix), and 2 if there is no artifact.
    --fix removes the commits of damaged shards, so that the command that made ARTIFACT writes these shards again,
    and repairs other damaged files.

    \b
    datamerge verify adv-2-255
    datamerge verify adv-2-255 --fix; datamerge merge photos/ adv-2-255 …
    """
    report = library.verify(artifact, fix=repair)
    if as_json:
        click.echo(json.dumps({"sound": not report.problems, **asdict(report)}))
    else:
        _show_report(report, repair)
    if report.problems:
        raise click.exceptions.Exit(1)


def _show_report(report: Report, repaired: bool) -> None:
    shown: Counter[str] = Counter()
    for problem in report.problems:
        shown[problem.file] += 1
        if shown[problem.file] <= SHOWN_PROBLEMS:
            click.echo(printable(str(problem)))
    for file, number in shown.items():
        if number > SHOWN_PROBLEMS:
            click.echo(f"{printable(file)}: … and {number - SHOWN_PROBLEMS} more, see --json")
    state = "" if report.complete else " (unfinished)"
    checked = f"{report.groups} groups in {report.shards} shards, {human_bytes(report.bytes)}"
    if not report.problems:
        click.echo(f"{report.url}: sound{state}; {checked}")
        return
    click.echo(
        f"{report.url}: {len(shown)} files are not as committed; {checked} were checked; {_advice(report, repaired)}"
    )


def _advice(report: Report, repaired: bool) -> str:
    """Advice about the problems of a report. `fix` repairs committed files and leaves stray files alone."""
    advice = []
    if any(not problem.stray for problem in report.problems):
        again = "the command that made the artifact again"
        done = "; ".join(
            filter(None, ["removed " + ", ".join(report.removed) if report.removed else "", f"run {again}"])
        )
        advice.append(done if repaired else f"run with --fix, then {again}")
    strays = len({problem.file for problem in report.problems if problem.stray})
    if strays:
        advice.append(f"move {strays} that {'is' if strays == 1 else 'are'} not of the artifact out of its folder")
    return "; ".join(advice)


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    members, moments, provenance = facts["members"], facts["moments"], facts["provenance"]
    arrays = ", ".join(f"{name} {spec['dtype']} {spec['shape']}" for name, spec in facts["arrays"].items())
    state = "complete" if facts["complete"] else "UNFINISHED: run the command that made it again"
    rows = [
        ("state", state),
        ("groups", f"{facts['groups']} of {facts['planned_groups']} planned, {facts['labelled']} labelled"),
        ("members", f"{members['min']} to {members['max']} a group, {members['total']} in all"),
        ("shards", f"{facts['shards']} of {facts['planned_shards']} planned, {facts['format']}"),
        ("bytes", human_bytes(facts["bytes"]) + _optional(" ({:.2f} a moment value)", facts["bytes_per_value"])),
        ("encoding", facts["encoding"]),
        ("arrays", arrays),
    ]
    if moments["mean_min"] is not None:
        rows += [
            ("mean", f"{moments['mean_min']:.4f} to {moments['mean_max']:.4f}"),
            ("variance", f"mean {moments['variance_mean']:.3e}, max {moments['variance_max']:.3e}"),
            ("clipped variances", str(moments["clipped_variances"])),
        ]
    losses = (("attack_loss_start", "at the start"), ("attack_loss", "at the end"))
    known = [f"{facts[name]:.4g} {when}" for name, when in losses if facts[name] is not None]
    if known:
        rows.append(("attack loss", ", ".join(known)))
    recorded = recorded_preprocessing(facts)
    shown = {**provenance, **({} if recorded is None else {"preprocessing": str(recorded)})}
    rows += [(name, _flat(value)) for name, value in shown.items()]
    rows += [("rejected", f"{reject['sample']}: {reject['reason']}") for reject in facts["rejects"][:20]]
    if len(facts["rejects"]) > 20:
        rows.append(("rejected", f"… {len(facts['rejects']) - 20} more, see --json"))
    return rows


def _optional(text: str, value: float | None) -> str:
    return "" if value is None else text.format(value)


def _text(foreign: str) -> Text:
    """Text from outside, shown literally: without markup or terminal control codes."""
    return Text(printable(foreign))


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} entries"
    return "none" if value is None else str(value)
