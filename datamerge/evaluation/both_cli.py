"""`datamerge evaluate` without a sub-command: flags to settings, results to a table or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from datamerge.evaluation.config import EvaluateConfig
from datamerge.evaluation.job import evaluate as run_evaluation
from datamerge.evaluation.report import print_table, to_json
from datamerge.evaluation.store import check_output, write_result
from datamerge.runtime import load_settings, local_path
from storage_schemas import ConfigError, Location


@click.command("both")
@click.argument("runs", nargs=-1, metavar="RUN [RUN…]")
@click.option("--data", metavar="SOURCE", help="Raw images: a folder, Parquet file or URL. Required.")
@click.option("--head", metavar="SPEC", help="FILE.safetensors, timm:…, open_clip:… or outputs. [no accuracies]")
@click.option("--class-names", metavar="FILE", help="The head's class names, one a line, in its order.")
@click.option("--original", metavar="SPEC", help="Reference of the embedding loss. [what the run started from]")
@click.option("--epsilon", help="Radius of the ℓ∞ ball, as a fraction of the pixel range. [2/255]")
@click.option("--steps", type=int, help="Gradient steps of the attack. [20]")
@click.option("--step-size", help="Step of the attack. [max(1/255, epsilon/4)]")
@click.option("--grid/--no-grid", "on_grid", default=None, help="Keep attacked pixels 8-bit. [no-grid]")
@click.option("--limit", type=int, help="Use the first so many samples. [all]")
@click.option("--batch-size", type=int, help="Images per forward pass; results do not depend on it. [64]")
@click.option("--seed", type=int, help="Seed of the attack's random starts. [0]")
@click.option("--device", help="cpu, cuda, cuda:1 … [auto]")
@click.option("--threads", type=int, help="CPU threads of torch. [its own choice]")
@click.option("--image-column", metavar="NAME", help="Parquet column of images. [the only one]")
@click.option("--label-column", metavar="NAME", help="Parquet column of labels. [label, labels or fine_label]")
@click.option("--config", "file", metavar="FILE.toml", help="Settings from a file; flags override them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("-o", "--output", metavar="FILE.json", help="Also write the JSON to a file.")
def both(runs: tuple[str, ...], file: str | None, as_json: bool, output: str | None, **flags: Any) -> None:
    """Measure encoders on raw images, clean and under attack. RUN is the folder of a finished training run, or an
    encoder spec such as open_clip:ViT-B-32/openai as the baseline.

    \b
    datamerge evaluate open_clip:ViT-B-32/openai my-run --data test-photos/
    datamerge evaluate my-run --data imagenet-val/ --limit 500 --head open_clip:ViT-B-32/openai \\
        --class-names imagenet-classes.txt -o my-run.json

    Embedding losses are squared distances to the original encoder's embeddings of the clean images; accuracies
    need labels (one sub-folder a class, or a label column) and a --head. All runs see the same images.
    """
    _check_output(output)
    config = load_settings(EvaluateConfig, file, {**flags, "runs": list(runs) or None})
    results = run_evaluation(config)
    text = to_json(config, results)
    # Shown first: a disk that is full by now must not take the results with it.
    if as_json:
        click.echo(text, nl=False)
    else:
        print_table(results)
    if output is not None:
        target = Path(output).expanduser().absolute()
        write_result(Location(target.parent), target.name, text.encode())


def _check_output(output: str | None) -> None:
    """Hours of attacks must not end at a file name that cannot be written."""
    if output is None:
        return
    target = local_path(output, "the results")
    if target.is_dir():
        raise ConfigError(f"output: expected the name of a file to write, found a folder at {output!r}")
    check_output(str(target.parent))
