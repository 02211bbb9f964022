"""Table 2 of the paper at its own scale: ImageNet, ViT-L/14, LLaVA-1.5-7B, COCO and VQAv2.

python -m experiments.paper.run --data /data --work /scratch/paper --dry-run
python -m experiments.paper.run --data /data --work /scratch/paper
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import click

from datamerge.runtime.checkout import commit
from experiments.paper.cost import Gpu, Stage, estimate
from experiments.paper.pipeline import Experiment
from experiments.paper.settings import read_study
from storage_schemas import DatamergeError

HERE = Path(__file__).parent


@click.command()
@click.argument(
    "settings", default=HERE / "settings.toml", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Folder of images, captions and models.")
@click.option("--work", required=True, type=click.Path(file_okay=False, path_type=Path), help="Artifacts and runs.")
@click.option("--dry-run", is_flag=True, help="Check requirements and print the cost, without running.")
@click.option("--peak-tflops", default=989.0, show_default=True, help="Peak of the GPU in half precision, dense.")
@click.option(
    "--peak-tflops-float32", default=67.0, show_default=True, help="Peak of the GPU in float32, without TF32."
)
@click.option("--utilisation", default=0.35, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--gpu-price", type=click.FloatRange(0), help="Price of a GPU hour, to print the total cost.")
def main(
    settings: Path,
    data: Path,
    work: Path,
    dry_run: bool,
    peak_tflops: float,
    peak_tflops_float32: float,
    utilisation: float,
    gpu_price: float | None,
) -> None:
    """Run the unfinished parts of the arms in SETTINGS, or with --dry-run print requirements and cost.

    The default peaks are those of an H100 SXM. The same command continues; concurrent processes share the arms.
    """
    gpu = Gpu({"half": peak_tflops * 1e12, "float32": peak_tflops_float32 * 1e12}, utilisation)
    try:
        study = read_study(settings)
        experiment = Experiment(study, study.data.below(data), work.expanduser().absolute())
        experiment.check_settings()
        if dry_run:
            _print_estimate(experiment, estimate(experiment, gpu), gpu_price)
        _refuse_what_is_missing(experiment)
        if dry_run:
            click.echo("all requirements are met")
            return
        experiment.check_memory()
        taken = experiment.run()
        command = f"python -m experiments.paper.run {'/'.join(settings.absolute().parts[-3:])}"
        click.echo(experiment.report(command, commit()), nl=False)
    except DatamergeError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        click.echo(f"error: {error.filename or work}: {error.strerror or error}", err=True)
        raise SystemExit(1) from None
    if taken:
        click.echo(f"other processes run {', '.join(taken)}; the last one to end writes the whole table", err=True)


def _refuse_what_is_missing(experiment: Experiment) -> None:
    """Print all missing requirements; exit with code 2 if there are any."""
    if shutil.which("java") is None:
        click.echo(
            "warning: found no Java, without which CIDEr is not comparable to published numbers; install a runtime",
            err=True,
        )
    found = experiment.problems()
    for message in found:
        click.echo(f"missing: {message}", err=True)
    if found:
        click.echo(f"{len(found)} problems; nothing was started", err=True)
        raise SystemExit(2)


def _print_estimate(experiment: Experiment, stages: Sequence[Stage], price: float | None) -> None:
    """Print one line per stage, and the totals."""
    study, work = experiment.study, experiment.work
    train = study.train
    click.echo(
        f"{train['steps']:,} steps at batch {train['batch_size']} need {study.groups:,} groups, one image each, so "
        "that none is seen twice"
    )
    click.echo(f"{'stage':<28}{'groups':>8}{'GB on disk':>12}{'GPU hours':>11}{'GPU GB':>8}")
    for stage in stages:
        hours = "–" if stage.hours is None else f"{stage.hours:.2f}"
        memory = "–" if stage.memory is None else f"{stage.memory / 1e9:.1f}"
        click.echo(f"{stage.name:<28}{stage.groups:>8,}{stage.disk / 1e9:>12.2f}{hours:>11}{memory:>8}")
    hours_in_all = sum(stage.hours or 0.0 for stage in stages)
    memory_in_all = max(stage.memory or 0.0 for stage in stages) / 1e9
    disk = sum(stage.disk for stage in stages) / 1e9
    click.echo(f"{'in all':<28}{'':>8}{disk:>12.2f}{hours_in_all:>11.2f}{memory_in_all:>8.1f}")
    existing = next(path for path in (work, *work.parents) if path.exists())
    click.echo(f"{shutil.disk_usage(existing).free / 1e9:.0f} GB are free at {existing}")
    if price is not None:
        click.echo(f"cost at {price:g} a GPU hour: {hours_in_all * price:,.0f}")
    click.echo("counted by experiments/paper/cost.py, not measured; an upper bound where attacks on LLaVA stop early")


if __name__ == "__main__":
    main()
