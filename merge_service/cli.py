"""`datamerge merge`."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal as human_bytes

from console import load_settings
from merge_service.config import MergeConfig
from merge_service.merge import MergeResult, Prepared, prepare, run
from storage_schemas import UserError


@click.command()
@click.argument("source", required=False)
@click.argument("artifact", required=False)
@click.option("--config", "config_file", metavar="FILE.toml", help="Settings by their long names; flags win.")
@click.option("--grouping", help="adversarial (default) or label.")
@click.option("--encoder", metavar="SPEC", help="Encoder to attack, e.g. open_clip:ViT-B-32/openai, timm:M@FILE.")
@click.option("--members", type=int, help="Samples N in a group (adversarial: 10; label: the whole class).")
@click.option("--epsilon", metavar="FRACTION", help="Radius of the l-inf ball, e.g. 2/255 (default).")
@click.option("--steps", type=int, help="Gradient steps (10).")
@click.option("--step-size", metavar="FRACTION", help="Step length, e.g. 1/255 (default).")
@click.option("--objective", help="squared_error to the clean embedding (default), or cross_entropy.")
@click.option("--head", metavar="FILE|SPEC", help="Class head for cross_entropy; stored in the artifact.")
@click.option("--class-names", metavar="FILE", help="Class names, one a line, for a zero-shot head.")
@click.option("--random-start/--no-random-start", default=None, help="Start at a random point of the ball.")
@click.option("--grid/--no-grid", default=None, help="Keep members on the 8-bit grid (default).")
@click.option("--format", help="zarr (default) or webdataset.")
@click.option("--encoding", help="uint8_moments (default on the grid) or float32.")
@click.option("--groups-per-shard", type=int, help="Unit of work and retry (256).")
@click.option("--keep-members/--no-keep-members", default=None, help="Store the members too.")
@click.option("--keep-clean/--no-keep-clean", default=None, help="Store the clean image too.")
@click.option("--shape", metavar="CxHxW", help="Pixels of label groups; the first image's by default.")
@click.option("--image-column", help="Parquet column with the images.")
@click.option("--label-column", help="Parquet column with the labels.")
@click.option("--seed", type=int, help="Seed of all random choices (0).")
@click.option("--license", metavar="ID", help="Licence for the dataset card, e.g. cc-by-4.0 (other).")
@click.option("--limit", type=int, help="Use the first LIMIT samples only.")
@click.option("--batch-size", type=int, help="Images in one forward pass (64).")
@click.option("--workers", type=int, help="Ray workers; as many as fit by default.")
@click.option("--threads", type=int, help="CPU threads of a worker (1); more threads, other rounding.")
@click.option("--device", help="auto (default), cpu or cuda.")
@click.option("--ray-address", metavar="ADDRESS", help="Ray cluster, e.g. auto; started here by default.")
@click.option("--max-rejected", type=int, help="Unusable samples to tolerate (1 %, at least 10).")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def merge(config_file: str | None, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Make groups of similar samples from SOURCE and store their moments in ARTIFACT.

    SOURCE is a folder of images, a Parquet file or a folder of them. Running the same command again continues
    where an earlier run stopped.

    \b
    datamerge merge photos/ adv-2-255 --encoder open_clip:ViT-L-14/openai --members 10 --epsilon 2/255
    datamerge merge mnist.parquet class-means --grouping label
    """
    config = load_settings(MergeConfig, config_file, flags)
    prepared = prepare(config)
    if dry_run:
        _show_plan(prepared, as_json)
        return
    try:
        result = run(prepared)
    except KeyboardInterrupt:
        click.echo(
            f"interrupted: finished shards are kept in {config.artifact}; run the same command again to continue",
            err=True,
        )
        raise click.exceptions.Exit(130) from None
    except FileExistsError as error:
        raise UserError(f"{config.artifact}: expected a folder or a free name, found a file ({error})") from None
    _show_result(config, result, as_json)


def _show_plan(prepared: Prepared, as_json: bool) -> None:
    layout = prepared.plan.layout
    raw = layout.bytes_per_record * layout.groups
    facts = {
        "groups": layout.groups,
        "shards": layout.shards,
        "uncompressed_bytes": raw,
        "arrays": {spec.name: f"{spec.dtype} {list(spec.shape)}" for spec in layout.arrays},
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    arrays = ", ".join(f"{name} {text}" for name, text in facts["arrays"].items())  # type: ignore[attr-defined]
    click.echo(
        f"{layout.groups} groups in {layout.shards} shards of {layout.groups_per_shard}, {layout.format}, "
        f"{layout.encoding}; {human_bytes(raw)} before compression\narrays: {arrays}"
    )


def _show_result(config: MergeConfig, result: MergeResult, as_json: bool) -> None:
    manifest = result.manifest
    rejected = sum(shard.rejected for shard in manifest.shards)
    if as_json:
        facts = {
            "artifact": config.artifact,
            "groups": manifest.groups,
            "shards": len(manifest.shards),
            "merged_shards": result.merged_shards,
            "rejected": rejected,
            "bytes": manifest.bytes,
            "seconds": round(result.seconds, 3),
            "attack_seconds": round(result.attack_seconds, 3),
        }
        click.echo(json.dumps(facts))
        return
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for reject in result.rejects[:10]:
        console.print(f"rejected {reject.sample}: {reject.reason}", markup=False)
    if len(result.rejects) > 10:
        console.print(f"… and {len(result.rejects) - 10} more, listed in {config.artifact}/commits")
    done = f"in {result.seconds:.1f} s" if result.merged_shards else "(already complete, nothing to do)"
    click.echo(
        f"{config.artifact}: {manifest.groups} groups in {len(manifest.shards)} shards, "
        f"{human_bytes(manifest.bytes)}, {rejected} rejected samples {done}"
    )
