"""`datamerge inspect` and `datamerge preview`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal as human_bytes
from rich.table import Table

from storage_schemas.artifact import open_artifact
from storage_schemas.location import Location
from storage_schemas.preview import contact_sheet
from storage_schemas.summary import summarise


@click.command()
@click.argument("artifact")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(artifact: str, as_json: bool) -> None:
    """Show what ARTIFACT holds: groups, bytes, encoding, ranges of its moments, provenance.

    \b
    datamerge inspect adv-2-255
    datamerge inspect s3://bucket/adv-2-255 --json | jq .provenance.encoder
    """
    facts = summarise(open_artifact(artifact, partial=True))
    if as_json:
        click.echo(json.dumps(facts))
        return
    table = Table(title=facts["url"], show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(name, value)
    Console(highlight=False).print(table)


@click.command()
@click.argument("artifact")
@click.option("-o", "--output", default="preview.png", show_default=True, help="PNG file to write.")
@click.option("--groups", default=8, show_default=True, type=click.IntRange(1, 64), help="Groups to draw.")
@click.option("--key", "keys", multiple=True, help="Draw the group with this key; may be repeated.")
def preview(artifact: str, output: str, groups: int, keys: tuple[str, ...]) -> None:
    """Draw a contact sheet of ARTIFACT: clean, members, mean, amplified difference, variance."""
    data = contact_sheet(open_artifact(artifact, partial=True), groups, keys)
    target = Path(output).absolute()
    Location(target.parent).write(target.name, data)
    click.echo(f"{output}: {human_bytes(len(data))}")


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    members, moments, provenance = facts["members"], facts["moments"], facts["provenance"]
    arrays = ", ".join(f"{name} {spec['dtype']} {spec['shape']}" for name, spec in facts["arrays"].items())
    state = "complete" if facts["complete"] else "UNFINISHED: run the same merge command again"
    rows = [
        ("state", state),
        ("groups", f"{facts['groups']} of {facts['planned_groups']} planned, {facts['labelled']} labelled"),
        ("members", f"{members['min']} to {members['max']} a group, {members['total']} in all"),
        ("shards", f"{facts['shards']} of {facts['planned_shards']} planned, {facts['format']}"),
        ("bytes", human_bytes(facts["bytes"]) + _optional(" ({:.2f} a moment value)", facts["bytes_per_value"])),
        ("encoding", facts["encoding"]),
        ("arrays", arrays),
    ]
    if facts["groups"]:
        rows += [
            ("mean", f"{moments['mean_min']:.4f} to {moments['mean_max']:.4f}"),
            ("variance", f"mean {moments['variance_mean']:.3e}, max {moments['variance_max']:.3e}"),
            ("clipped variances", str(moments["clipped_variances"])),
        ]
    if facts["attack_loss"] is not None:
        rows.append(
            (
                "attack loss",
                f"{facts['attack_loss_start']:.4g} at the start, {facts['attack_loss']:.4g} at the end",
            )
        )
    rows += [(name, _flat(value)) for name, value in provenance.items()]
    rows += [("rejected", f"{reject['sample']}: {reject['reason']}") for reject in facts["rejects"][:20]]
    if len(facts["rejects"]) > 20:
        rows.append(("rejected", f"… {len(facts['rejects']) - 20} more, see --json"))
    return rows


def _optional(text: str, value: float | None) -> str:
    return "" if value is None else text.format(value)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} entries"
    return str(value)
