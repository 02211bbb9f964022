"""`datamerge merge`."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal as human_bytes

from datamerge.runtime import load_settings
from datamerge.runtime.options import HELP_FLAGS, options
from datamerge.runtime.signals import Terminated
from merge_service.config import MergeConfig
from merge_service.merge import MergeResult, Prepared, prepare
from merge_service.merge import merge as run_merge
from storage_schemas import ConfigError


@click.command(context_settings=HELP_FLAGS)
@options(MergeConfig)
@click.option(
    "--config", "config_file", metavar="FILE.toml", help="Settings by their long names; flags override them."
)
@click.option("--dry-run", is_flag=True, help="Measure a small part, print an estimate for the whole, and stop.")
@click.option("--price-per-hour", type=float, help="Price of a worker-hour, for the cost in --dry-run.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def merge(
    config_file: str | None,
    dry_run: bool,
    price_per_hour: float | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Make groups of similar samples from SOURCE and store their moments in ARTIFACT.

    SOURCE is a folder of images, Parquet files or tars, one such file, an .npz or IDX file, a pattern of tars, or
    python:MODULE:FACTORY. Running the same command again continues where an earlier run stopped.

    \b
    datamerge merge photos/ adv-2-255 --encoder open_clip:ViT-L-14/openai --members 10 --epsilon 2/255
    datamerge merge mnist.parquet class-means --grouping label
    datamerge merge 'shards/{000..099}.tar' clusters --grouping cluster --clusters 20
    """
    if price_per_hour is not None and not dry_run:
        raise ConfigError(
            f"`price_per_hour={price_per_hour:g}`: only a dry run shows a cost; add `dry_run=True`, or drop it",
            about="price_per_hour",
        )
    if price_per_hour is not None and not 0 < price_per_hour < math.inf:
        raise ConfigError(
            f"`price_per_hour={price_per_hour:g}`: expected a price above 0; change it, or drop it",
            about="price_per_hour",
        )
    config = load_settings(MergeConfig, config_file, flags)
    if dry_run:
        _show_plan(prepare(config, planning_only=True), price_per_hour, as_json)
        return
    try:
        result = run_merge(config)
    except KeyboardInterrupt as stop:
        what, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        click.echo(
            f"{what}: finished shards are kept in {config.artifact}; run the same command again to continue", err=True
        )
        raise click.exceptions.Exit(code) from None
    _show_result(config, result, as_json)


def _show_plan(prepared: Prepared, price_per_hour: float | None, as_json: bool) -> None:
    from merge_service.estimate import estimate  # torch's FLOP counter takes a second

    layout = prepared.plan.layout
    found = estimate(prepared)
    raw = layout.bytes_per_record * layout.groups
    facts: dict[str, Any] = {
        "groups": layout.groups,
        "shards": layout.shards,
        "uncompressed_bytes": raw,
        "arrays": {spec.name: f"{spec.dtype} {list(spec.shape)}" for spec in layout.arrays},
        "preprocessing": prepared.plan.preprocessing.record(),
        "estimate": dataclasses.asdict(found),
    }
    if price_per_hour is not None:
        facts["estimate"]["cost"] = round(found.cost(price_per_hour), 2)
    if as_json:
        click.echo(json.dumps(facts))
        return
    arrays = ", ".join(f"{name} {text}" for name, text in facts["arrays"].items())
    click.echo(
        f"{layout.groups} groups in {layout.shards} shards of {layout.groups_per_shard}, {layout.format}, "
        f"{layout.encoding}; {human_bytes(raw)} before compression, about {human_bytes(found.bytes)} after\n"
        f"arrays: {arrays}\n"
        f"pixels: {prepared.plan.preprocessing}"
    )
    if found.flops and found.flop_per_second and found.peak_share:
        click.echo(
            f"encoder: {found.flops:.3g} FLOPs in all, {found.flop_per_second:.3g} a second and worker, "
            f"{100 * found.peak_share:.0f} % of what a large matrix product reaches here"
        )
    cost = "" if price_per_hour is None else f", {facts['estimate']['cost']:.2f} at {price_per_hour:g} a worker-hour"
    click.echo(
        f"time: about {_human_seconds(found.seconds)} with {found.workers} workers like this machine{cost} "
        f"(from {found.measured} measured)"
    )
    here = "" if found.free_bytes is None else f"; {human_bytes(found.free_bytes)} are free here"
    click.echo(
        f"memory: about {human_bytes(found.worker_bytes)} a worker, "
        f"{human_bytes(found.workers * found.worker_bytes)} in all{here}"
    )
    if found.shortage is not None:
        click.echo(found.shortage)


def _human_seconds(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.1f} minutes"


def _show_result(config: MergeConfig, result: MergeResult, as_json: bool) -> None:
    manifest = result.manifest
    rejected = sum(manifest.shards.column("rejected"))
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
        console.print(f"… and {len(result.rejects) - 10} more, listed in {config.artifact}/commits", markup=False)
    done = f"in {result.seconds:.1f} s" if result.merged_shards else "(already complete, nothing to do)"
    click.echo(
        f"{config.artifact}: {manifest.groups} groups in {len(manifest.shards)} shards, "
        f"{human_bytes(manifest.bytes)}, {rejected} rejected samples {done}"
    )
