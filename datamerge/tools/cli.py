"""`datamerge convert`, `remerge`, `combine`, `diff` and `export`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, get_args

import click
from pydantic import Field
from rich.filesize import decimal as human_bytes

from datamerge import artifacts as library
from datamerge.runtime import Settings, load_settings
from datamerge.runtime.options import HELP_FLAGS, Option, options
from datamerge.runtime.settings import Effect
from storage_schemas import Artifact, DatamergeError, open_artifact, printable, redact, shortened
from storage_schemas.operations.diff import Difference
from storage_schemas.operations.export import Kind
from storage_schemas.operations.remerge import Remerge
from storage_schemas.schema.factors import FactorKind
from storage_schemas.schema.manifest import EncodingName, Format

SHOWN = 20
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.command(context_settings=HELP_FLAGS)
@click.argument("source")
@click.argument("target")
@click.option("--format", type=click.Choice(get_args(Format)), help="File format; SOURCE's by default.")
@click.option("--encoding", type=click.Choice(get_args(EncodingName)), help="Encoding; SOURCE's by default.")
@JSON
def convert(source: str, target: str, format: Format | None, encoding: EncodingName | None, as_json: bool) -> None:
    """Write the groups of SOURCE to TARGET in another format or encoding.

    uint8_moments to float32 rounds once; float32 to uint8_moments is exact, or refused if the values are not
    moments of 8-bit pixels. Running the same command again continues where an earlier run stopped.

    \b
    datamerge convert adv-2-255 adv-2-255-tar --format webdataset
    datamerge convert adv-2-255 s3://bucket/adv-2-255
    """
    with _writing(target):
        written = library.convert(source, target, format=format, encoding=encoding)
    _show_written(target, written, as_json)


class RemergeSettings(Settings):
    """The settings of `Remerge` as options; `Remerge` checks their values."""

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            ("factor_kind",), lambda settings: settings.factors is not None, "there are no factors; set `factors`"
        ),
    )

    members: Annotated[int | None, Option(metavar="N", unset="all")] = Field(
        Remerge.members, description="Number of members to take from each group, from the first on."
    )
    factors: Annotated[int | None, Option(metavar="K", unset="none")] = Field(
        Remerge.factors, description="Factors of each group's covariance to store."
    )
    factor_kind: FactorKind = Field(
        Remerge.factor_kind, description="Random sketches, or principal directions (always where K >= N - 1)."
    )
    keep_members: Annotated[bool, Option(alias=" /--drop-members")] = Field(
        Remerge.keep_members, description="Store the members again."
    )


@click.command("remerge", context_settings=HELP_FLAGS)
@click.argument("source")
@click.argument("target")
@options(RemergeSettings)
@JSON
def remerge_members(source: str, target: str, as_json: bool, **flags: Any) -> None:
    """Merge the stored members of SOURCE again, without an attack: fewer members, or other factors.

    The result is what `datamerge merge` with these settings would have written. SOURCE has to store its members
    (`merge --keep-members`). Running the same command again continues where an earlier run stopped.

    \b
    datamerge remerge adv-n10 adv-n5 --members 5
    datamerge remerge adv-n10 adv-sketch --factors 1 --drop-members
    """
    with _writing(target):
        settings = load_settings(RemergeSettings, None, flags)
        written = library.remerge(source, target, Remerge(**settings.model_dump()))
    _show_written(target, written, as_json)


@click.command(context_settings=HELP_FLAGS)
@click.argument("artifacts", nargs=-1, required=True)
@click.argument("output")
@click.option(
    "--allow-different",
    "allowed",
    multiple=True,
    metavar="NAME[,…]",
    help="Entries of the provenance that may differ, e.g. attack.epsilon.",
)
@JSON
def combine(artifacts: tuple[str, ...], output: str, allowed: tuple[str, ...], as_json: bool) -> None:
    """Write the union of two or more ARTIFACTS to OUTPUT.

    Groups with the same key become one group with all their members, exactly; other groups are copied. Artifacts
    made with different settings are refused, with the differences. Seeds may differ, and so may the attacked encoder
    (in a later round) if the targets are equal. Running the same command again continues where an earlier run
    stopped.

    \b
    datamerge combine round-1 round-2 rounds-1-2
    datamerge combine part-a part-b part-c whole
    """
    names = [name.strip() for text in allowed for name in text.split(",")]
    with _writing(output):
        written = library.combine(artifacts, output, allow_different=names)
    _show_written(output, written, as_json)


@click.command(context_settings=HELP_FLAGS)
@click.argument("a")
@click.argument("b")
@click.option(
    "--tolerance", default=0.0, type=click.FloatRange(min=0), help="Largest difference that counts as equal."
)
@JSON
def diff(a: str, b: str, tolerance: float, as_json: bool) -> None:
    """Compare the groups of artifacts A and B: which are in one only, which differ, and by how much.

    The exit code is 0 if all groups are equal, 1 if any differs, and 2 if the artifacts cannot be compared.

    \b
    datamerge diff adv-2-255 adv-2-255-tar
    datamerge diff adv-2-255 adv-2-255-float32 --tolerance 1e-6
    """
    try:
        first, second = open_artifact(a), open_artifact(b)
        found = library.diff(first, second, tolerance=tolerance)
    except DatamergeError as error:
        error.exit_code = 2  # as in diff(1), 1 means only that they differ
        raise
    click.echo(json.dumps(found.as_json()) if as_json else "\n".join(map(printable, _lines(found, first, second))))
    if not found.equal:
        raise click.exceptions.Exit(1)


@click.command(context_settings=HELP_FLAGS)
@click.argument("artifact")
@click.argument("keys", nargs=-1, required=True)
@click.option("-o", "--output", default=".", show_default=True, help="Folder for the files; path or URL.")
@click.option(
    "--to", "kind", default="npz", show_default=True, type=click.Choice(get_args(Kind)), help="File format."
)
@JSON
def export(artifact: str, keys: tuple[str, ...], output: str, kind: Kind, as_json: bool) -> None:
    """Write the groups of ARTIFACT with these KEYS in common file formats.

    npz holds all arrays, with mean, mean square and variance in [0, 1]; png holds pictures of the mean, the
    variance, the clean image and the members.

    \b
    datamerge export adv-2-255 n01440764_10026 -o groups
    datamerge export adv-2-255 n01440764_10026 n01440764_10027 -o groups --to png
    """
    names = library.export(artifact, keys, output, kind=kind)
    shown = redact(output)
    click.echo(json.dumps({"output": shown, "files": names}) if as_json else f"{shown}: {len(names)} files")


@contextmanager
def _writing(output: str) -> Iterator[None]:
    """After Ctrl-C, say how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(
            f"interrupted: finished shards are kept in {redact(output)}; run the same command again to continue",
            err=True,
        )
        raise click.exceptions.Exit(130) from None


def _show_written(output: str, written: Artifact, as_json: bool) -> None:
    manifest, layout = written.manifest, written.manifest.layout
    facts = {
        "artifact": redact(output),
        "groups": manifest.groups,
        "shards": len(manifest.shards),
        "bytes": manifest.bytes,
        "format": layout.format,
        "encoding": layout.encoding,
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    click.echo(
        f"{facts['artifact']}: {manifest.groups} groups in {len(manifest.shards)} shards, "
        f"{human_bytes(manifest.bytes)}, {layout.format}, {layout.encoding}"
    )


def _lines(found: Difference, a: Artifact, b: Artifact) -> list[str]:
    """The result as text: settings, groups in one only, groups that differ, a summary."""
    lines = [f"{name}: {shortened(pair[0])} | {shortened(pair[1])}" for name, pair in found.settings.items()]
    for keys, artifact in ((found.only_in_a, a), (found.only_in_b, b)):
        lines += _shortened([f"only in {artifact.location.url}: {key}" for key in keys])
    lines += _shortened(
        [
            f"{group.key}: "
            + ", ".join(
                [f"{name} {shortened(pair[0])} | {shortened(pair[1])}" for name, pair in group.facts.items()]
                + [f"{name} {_distance(value)}" for name, value in group.distance.items()]
            )
            for group in found.different
        ]
    )
    if found.head:
        lines.append("the class heads differ")
    furthest = ", ".join(f"{name} {value:.3g}" for name, value in found.furthest.items())
    if found.equal:
        within = f" (within the tolerance; furthest apart: {furthest})" if furthest else ""
        lines.append(f"equal: {found.compared} groups{within}")
    else:
        lines.append(
            f"different: {len(found.different)} of {found.compared} common groups differ, {len(found.only_in_a)} are "
            f"in A only, {len(found.only_in_b)} in B only" + (f"; furthest apart: {furthest}" if furthest else "")
        )
    return lines


def _shortened(lines: Sequence[str]) -> list[str]:
    more = [f"… and {len(lines) - SHOWN} more, see --json"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more]


def _distance(value: float | None) -> str:
    return "not in both, or of another shape" if value is None else f"differs by {value:.3g}"
