"""`datamerge evaluate`: a sub-command for every part of the evaluation; without one, loss and accuracy under PGD."""

from __future__ import annotations

from typing import Any

import click

from datamerge.evaluation.parts import PARTS, evaluate_all
from datamerge.evaluation.reports import write_reports
from datamerge.evaluation.store import check_output
from datamerge.evaluation.tables import print_rows, table_rows, to_json
from datamerge.runtime import load_settings
from datamerge.runtime.options import HELP_FLAGS, options

HELP = {
    "pgd": """Loss and accuracy at once, clean and under PGD. The word `pgd` may be left out.

    \b
    datamerge evaluate open_clip:ViT-B-32/openai my-run --data test-photos/
    datamerge evaluate my-run --data imagenet-val/ --limit 500 --head open_clip:ViT-B-32/openai \\
        --class-names imagenet-classes.txt -o results

    Embedding losses are squared distances to the original encoder's embeddings of the clean images; accuracies
    need labels (one sub-folder a class, or a label column) and a --head.
    """,
    "zero-shot": """Top-1 and top-5 accuracy, clean and robust at several radii.

    Labels come from class sub-folders or a column. A RUN is classified by the text tower of what it started from.
    """,
    "embedding": "Squared distance of embeddings to the frozen original's, clean and under APGD (FARE, Table 14).",
    "captions": """CIDEr of LLaVA's captions with each RUN as its vision encoder, clean and under attack.

    A RUN may also be hf:PATH, a Hugging Face CLIP vision model, or `own`, LLaVA's own tower. One JSON file per image
    is stored; the same command again continues.
    """,
    "vqa": "VQAv2 accuracy of LLaVA with each RUN as its vision encoder, clean and under attack; see `captions`.",
}


class DefaultGroup(click.Group):
    """A group that runs `pgd` when no sub-command is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["pgd", *args]
        return super().parse_args(ctx, args)


@click.group(cls=DefaultGroup, context_settings=HELP_FLAGS)
def evaluate() -> None:
    """Measure encoders on raw images, clean and under attack.

    \b
    datamerge evaluate            RUN… --data photos/ --head head.safetensors     # loss and PGD accuracy at once
    datamerge evaluate zero-shot  RUN… --data imagenet-val/ --class-names imagenet
    datamerge evaluate embedding  RUN… --data imagenet-val/ --sample 500
    datamerge evaluate captions   RUN… --data dataset_coco.json --images coco/
    datamerge evaluate vqa        RUN… --data questions.json --annotations annotations.json --images coco/val2014
    datamerge evaluate all        RUN… --config evaluation.toml

    RUN is the folder of a finished training run, or an encoder spec such as open_clip:ViT-L-14/openai as the
    baseline. Results go to --output: one table of arms for all parts, as report.html, report.md and results.json.
    Every finished piece of work is stored there; the same command again continues. The first form, whose options
    `datamerge evaluate pgd --help` lists, stores nothing without --output.
    """


def _add_command(name: str) -> None:
    @evaluate.command(name, help=HELP[name])
    @options(PARTS[name].settings)
    @click.option("--config", "file", metavar="FILE.toml", help="Settings from a file; flags override them.")
    @click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
    def command(file: str | None, as_json: bool, **flags: Any) -> None:
        config = load_settings(PARTS[name].settings, file, flags)
        if config.output is not None:
            check_output(config.output)
        results = PARTS[name].evaluate(config)
        rows = table_rows(results) if config.output is None else write_reports(config.output, name, results)
        if as_json:
            click.echo(to_json(results), nl=False)
            return
        print_rows(rows)
        if config.output is not None:
            click.echo(f"{config.output}/report.html: table, curves, pictures and settings")


for _name in PARTS:
    _add_command(_name)


@evaluate.command("all")
@click.argument("runs", nargs=-1, metavar="RUN…")
@click.option("--config", "file", metavar="FILE.toml", required=True, help="A table per part: [zero-shot] …")
@click.option("--data", metavar="SOURCE", help="Raw images of pgd, zero-shot and embedding. [as in the file]")
@click.option("-o", "--output", metavar="FOLDER", help="Where results go. [as in the file]")
@click.option("--device", help="cpu, cuda, cuda:1 … [as in the file]")
def everything(runs: tuple[str, ...], file: str, data: str | None, output: str | None, device: str | None) -> None:
    """All parts that FILE.toml has a table for, into one report.

    \b
    output = "results"
    [embedding]
    data = "imagenet-val/"
    sample = 500
    [zero-shot]
    data = "imagenet-val/"
    class_names = "imagenet"
    [captions]
    data = "dataset_coco.json"
    images = "coco/"
    [vqa]
    data = "questions.json"
    annotations = "annotations.json"
    images = "coco/val2014"
    """
    print_rows(evaluate_all(file, list(runs), data=data, output=output, device=device))
