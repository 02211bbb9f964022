"""`datamerge merge`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.filesize import decimal as human_bytes

from datamerge.runtime import load_settings
from merge_service.config import MergeConfig
from merge_service.merge import MergeResult, Prepared, prepare, run
from merge_service.termination import Terminated
from storage_schemas import ConfigError, UserError


@click.command()
@click.argument("source", required=False)
@click.argument("artifact", required=False)
@click.option("--config", "config_file", metavar="FILE.toml", help="Settings by their long names; flags win.")
@click.option("--grouping", help="adversarial (default), label, cluster or column.")
@click.option("--encoder", metavar="SPEC|RUN", help="Encoder to attack, e.g. open_clip:ViT-B-32/openai, or a run.")
@click.option("--target-encoder", metavar="SPEC|RUN", help="Encoder of the targets, if not the attacked one.")
@click.option("--targets", help="embedding (default of adversarial groups), label (of others) or both.")
@click.option("--members", type=int, help="Samples N in a group (adversarial: 10; label: the whole class).")
@click.option("--clusters", type=int, help="k-means clusters of a class, for --grouping cluster.")
@click.option("--cluster-by", help="pixels (default) or embedding.")
@click.option("--group-column", help="Column whose values name the groups, for --grouping column.")
@click.option("--attack", help="pgd (default) or apgd.")
@click.option("--epsilon", metavar="FRACTION", help="Radius of the l-inf ball, e.g. 2/255 (default).")
@click.option("--steps", type=int, help="Gradient steps (10).")
@click.option("--step-size", metavar="FRACTION", help="Length of a PGD step, e.g. 1/255 (default).")
@click.option("--random-start/--no-random-start", default=None, help="Start at a random point of the ball.")
@click.option("--start-radius", metavar="FRACTION", help="Radius of the random start, if smaller than epsilon.")
@click.option("--restarts", type=int, help="Attacks of each member, of which the strongest is kept (1).")
@click.option("--objective", help="squared_error to the clean embedding (default), or cross_entropy.")
@click.option("--head", metavar="FILE|SPEC", help="Class head for cross_entropy; stored in the artifact.")
@click.option("--class-names", metavar="FILE", help="Class names, one a line, for a zero-shot head.")
@click.option("--grid/--no-grid", default=None, help="Keep members on the 8-bit grid (default).")
@click.option("--precision", help="Forward passes of the attack: float32 (default), tf32 or bfloat16.")
@click.option("--compile/--no-compile", default=None, help="Run encoders through torch.compile.")
@click.option("--format", help="zarr (default) or webdataset.")
@click.option("--encoding", help="uint8_moments (default on the grid) or float32.")
@click.option("--groups-per-shard", type=int, help="Unit of work and retry (256).")
@click.option("--keep-members/--no-keep-members", default=None, help="Store the members too.")
@click.option("--factors", type=int, help="Factors K of each group's covariance to store too; see --factor-kind.")
@click.option("--factor-kind", help="sketch (default; as principal where it has k >= N - 1), or principal.")
@click.option("--keep-clean/--no-keep-clean", default=None, help="Store the clean image too.")
@click.option("--shape", metavar="CxHxW", help="Pixels where no encoder says; the first image's by default.")
@click.option("--resize/--no-resize", default=None, help="Resize and crop (default), or reject other sizes.")
@click.option("--image-column", help="Column or array with the images.")
@click.option("--label-column", help="Column, array or tar member with the labels.")
@click.option("--seed", type=int, help="Seed of all random choices (0).")
@click.option("--license", metavar="ID", help="Licence for the dataset card, e.g. cc-by-4.0 (other).")
@click.option("--limit", type=int, help="Use the first LIMIT samples only.")
@click.option("--batch-size", type=int, help="Images in one forward pass (64); at least one group.")
@click.option("--max-workers", type=int, help="Ray workers; as many as fit by default.")
@click.option("--num-cpus", type=int, help="CPUs of a worker; its threads by default.")
@click.option("--num-gpus", type=float, help="GPUs of a worker (1); 0.5 lets two share one.")
@click.option("--threads", type=int, help="Threads of an encoder on a CPU (1); more threads, other rounding.")
@click.option("--device", help="auto (default), cpu or cuda.")
@click.option("--ray-address", metavar="ADDRESS", help="Ray cluster, e.g. auto; started here by default.")
@click.option("--max-rejected", type=int, help="Unusable samples to tolerate (1 %, at least 10).")
@click.option("--dry-run", is_flag=True, help="Measure a small piece, show what the whole would take, and stop.")
@click.option("--price-per-hour", type=float, help="Of one worker, for the cost that --dry-run shows.")
@click.option("--submit", metavar="URL", help="Run on this cluster through the Ray Jobs API, e.g. http://head:8265.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def merge(
    config_file: str | None,
    dry_run: bool,
    price_per_hour: float | None,
    submit: str | None,
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
    if dry_run and submit is not None:
        # A submitted job costs money: never run one for a command that asked to be told the cost first.
        raise ConfigError("submit: expected a merge to run, found --dry-run; drop --submit or --dry-run")
    if price_per_hour is not None and not dry_run:
        raise ConfigError("price_per_hour: expected --dry-run beside it, found none; add --dry-run or drop the price")
    config = load_settings(MergeConfig, config_file, flags)
    if submit is not None:
        _submit(config, submit, as_json)
    prepared = prepare(config, planning_only=dry_run)
    if dry_run:
        _show_plan(prepared, price_per_hour, as_json)
        return
    try:
        result = run(prepared)
    except KeyboardInterrupt as stop:
        what, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        click.echo(
            f"{what}: finished shards are kept in {config.artifact}; run the same command again to continue", err=True
        )
        raise click.exceptions.Exit(code) from None
    except FileExistsError as error:
        raise UserError(f"{config.artifact}: expected a folder or a free name, found a file ({error})") from None
    _show_result(config, result, as_json)


def _submit(config: MergeConfig, address: str, as_json: bool) -> NoReturn:
    """Run the same merge on a cluster, and end with its exit code."""
    from merge_service.ray_jobs import submit_job

    if config.ray_address is not None:
        raise UserError("submit: the job finds its own cluster; drop --ray-address")
    command = ["datamerge", "merge", *as_arguments(config), "--ray-address", "auto"]
    raise click.exceptions.Exit(submit_job(address, command + (["--json"] if as_json else [])))


def as_arguments(config: MergeConfig) -> list[str]:
    """The command line that gives these settings, independent of any file on this machine."""
    arguments = [config.source, config.artifact]
    for name, value in config.model_dump(exclude_defaults=True, exclude={"source", "artifact"}).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments += [f"--{flag}", str(value)]
    return arguments


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
        f"arrays: {arrays}"
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


def _human_seconds(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.1f} minutes"


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
        console.print(f"… and {len(result.rejects) - 10} more, listed in {config.artifact}/commits", markup=False)
    done = f"in {result.seconds:.1f} s" if result.merged_shards else "(already complete, nothing to do)"
    click.echo(
        f"{config.artifact}: {manifest.groups} groups in {len(manifest.shards)} shards, "
        f"{human_bytes(manifest.bytes)}, {rejected} rejected samples {done}"
    )
