"""`datamerge evaluate`: sub-commands for the parts of the evaluation; without one, loss and accuracy in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from datamerge.evaluation.both_cli import both
from datamerge.evaluation.config import EmbeddingConfig, ZeroShotConfig
from datamerge.evaluation.results import ArmResult
from datamerge.evaluation.store import check_output
from datamerge.evaluation.tables import print_rows, write_reports
from datamerge.runtime import load_settings

F = TypeVar("F", bound=Callable[..., Any])


class DefaultGroup(click.Group):
    """A group that runs `both` when no sub-command is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["both", *args]
        return super().parse_args(ctx, args)


@click.group(cls=DefaultGroup, context_settings={"help_option_names": ["-h", "--help"]})
def evaluate() -> None:
    """Measure encoders on raw images, clean and under attack.

    \b
    datamerge evaluate zero-shot  RUN… --data imagenet-val/ --class-names imagenet
    datamerge evaluate embedding  RUN… --data imagenet-val/ --sample 500
    datamerge evaluate captions   RUN… --data dataset_coco.json --images coco/
    datamerge evaluate vqa        RUN… --data questions.json --annotations annotations.json --images coco/val2014
    datamerge evaluate all        RUN… --config evaluation.toml

    RUN is the folder of a finished training run, or an encoder spec such as open_clip:ViT-L-14/openai as the
    baseline. Results go to --output: one table of arms for all parts, as report.html, report.md and results.json.
    Every finished piece of work is stored there; the same command again continues.

    \b
    datamerge evaluate RUN… --data SOURCE      embedding loss and PGD accuracy at once, as a table on the terminal
                                               (`datamerge evaluate both --help`)
    """


evaluate.add_command(both)


def _options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_RUNS = click.argument("runs", nargs=-1, metavar="RUN [RUN…]")
_WORK = (
    click.option("--device", help="cpu, cuda, cuda:1 … [auto]"),
    click.option("--threads", type=int, help="CPU threads of torch. [its own choice]"),
    click.option("--config", "file", metavar="FILE.toml", help="Settings from a file; flags override them."),
    click.option("-o", "--output", metavar="FOLDER", help="Where results go. [evaluation-results]"),
)
_IMAGES = (
    click.option("--data", metavar="SOURCE", help="Raw images: a folder, Parquet file or URL. Required."),
    click.option("--limit", type=int, help="Use the first so many samples. [all]"),
    click.option("--sample", type=int, help="Draw so many samples at random. [all]"),
    click.option("--sample-seed", type=int, help="Seed of that draw. [42]"),
    click.option("--epsilons", metavar="LIST", help="Radii of the ball, e.g. 1/255,2/255,4/255."),
    click.option("--norm", type=click.Choice(["linf", "l2"]), help="Norm of the ball. [linf]"),
    click.option("--steps", type=int, help="Gradient steps of each attack. [100]"),
    click.option("--restarts", type=int, help="Random starts of each attack. [1]"),
    click.option("--batch-size", type=int, help="Images per forward pass; results do not depend on it. [64]"),
    click.option("--seed", type=int, help="Seed of the attack's random starts. [0]"),
    click.option("--image-column", metavar="NAME", help="Column of images. [the only one]"),
    click.option("--label-column", metavar="NAME", help="Column of labels. [label, labels or fine_label]"),
)
_LLAVA = (
    click.option("--llava", metavar="PATH", help="LLaVA model: a folder or a hub name. [llava-hf/llava-1.5-7b-hf]"),
    click.option("--image-size", type=int, help="Pixels of the vision tower's input, 0 for its native size. [224]"),
    click.option("--fit", type=click.Choice(["pad", "crop"]), help="How images are made square. [pad]"),
    click.option("--epsilon", help="Radius of the ℓ∞ ball, as a fraction of the pixel range. [2/255]"),
    click.option("--steps", type=int, help="APGD steps of each pass. [100]"),
    click.option("--attack/--no-attack", "attack", default=None, help="Also measure under attack. [attack]"),
    click.option("--sample", type=int, help="Images or questions drawn at random. [100]"),
    click.option("--sample-seed", type=int, help="Seed of that draw. [42]"),
    click.option("--batch-size", type=int, help="Images at once; results do not depend on it. [1]"),
    click.option(
        "--half",
        type=click.Choice(["float16", "bfloat16", "float32"]),
        help="Arithmetic of all passes but the last. [float16 on a GPU, float32 elsewhere]",
    ),
    click.option("--save-images", is_flag=True, default=None, help="Keep every adversarial image, as 8-bit PNG."),
    click.option("--pictures", type=int, help="Images shown in the report. [8]"),
)
_CAPTION_DATA = (
    click.option("--data", metavar="FILE.json", help="COCO captions: Karpathy's or the official file. Required."),
    click.option("--images", metavar="FOLDER", help="The images the file names. Required."),
    click.option("--split", help="Split of a Karpathy file. [test]"),
)
_VQA_DATA = (
    click.option("--data", metavar="FILE.json", help="VQAv2 questions. Required."),
    click.option("--annotations", metavar="FILE.json", help="VQAv2 annotations: the answers. Required."),
    click.option("--images", metavar="FOLDER", help="The images the file names. Required."),
)


@evaluate.command("zero-shot")
@_options(
    _RUNS,
    *_IMAGES,
    click.option("--head", metavar="SPEC", help="FILE.safetensors, timm:…, open_clip:… or outputs. [the text tower]"),
    click.option("--class-names", metavar="FILE", help="Class names, one a line in label order, or imagenet."),
    click.option("--templates", metavar="FILE", help="Prompts with {}, one a line, or openai or simple. [openai]"),
    click.option("--attack", type=click.Choice(["autoattack", "apgd"]), help="APGD-CE + DLR-T, or CE. [autoattack]"),
    click.option("--check-masking/--no-check-masking", default=None, help="Look for masked gradients. [check]"),
    *_WORK,
)
def zero_shot(runs: tuple[str, ...], file: str | None, epsilons: str | None, **flags: Any) -> None:
    """Top-1 and top-5 accuracy, clean and robust at several radii.

    Labels come from class sub-folders or a column. A RUN is classified by the text tower of what it started from.
    """
    from datamerge.evaluation.zero_shot import evaluate_zero_shot

    config = load_settings(ZeroShotConfig, file, {**flags, "runs": list(runs) or None, "epsilons": _split(epsilons)})
    check_output(config.output)
    _report(config.output, evaluate_zero_shot(config))


@evaluate.command("embedding")
@_options(
    _RUNS,
    *_IMAGES,
    click.option("--original", metavar="SPEC", help="Reference of the loss. [what the run started from]"),
    *_WORK,
)
def embedding(runs: tuple[str, ...], file: str | None, epsilons: str | None, **flags: Any) -> None:
    """Squared distance of embeddings to the frozen original's, clean and under APGD (FARE, Table 14)."""
    from datamerge.evaluation.embedding import evaluate_embedding

    config = load_settings(EmbeddingConfig, file, {**flags, "runs": list(runs) or None, "epsilons": _split(epsilons)})
    check_output(config.output)
    _report(config.output, evaluate_embedding(config))


@evaluate.command("captions")
@_options(_RUNS, *_CAPTION_DATA, *_LLAVA, *_WORK)
def captions(runs: tuple[str, ...], file: str | None, **flags: Any) -> None:
    """CIDEr of LLaVA's captions with each RUN as its vision encoder, clean and under attack.

    A RUN may also be hf:PATH, a Hugging Face CLIP vision model, or `own`, LLaVA's own tower. One JSON file per image
    is stored; the same command again continues.
    """
    with _needs_packages():
        from datamerge.evaluation.llava.captions import evaluate_captions
        from datamerge.evaluation.llava.config import CaptionsConfig

    config = load_settings(CaptionsConfig, file, {**flags, "runs": list(runs) or None})
    check_output(config.output)
    _report(config.output, evaluate_captions(config))


@evaluate.command("vqa")
@_options(_RUNS, *_VQA_DATA, *_LLAVA, *_WORK)
def vqa(runs: tuple[str, ...], file: str | None, **flags: Any) -> None:
    """VQAv2 accuracy of LLaVA with each RUN as its vision encoder, clean and under attack; see `captions`."""
    with _needs_packages():
        from datamerge.evaluation.llava.config import VqaConfig
        from datamerge.evaluation.llava.vqa import evaluate_vqa

    config = load_settings(VqaConfig, file, {**flags, "runs": list(runs) or None})
    check_output(config.output)
    _report(config.output, evaluate_vqa(config))


@evaluate.command("all")
@_options(
    _RUNS,
    click.option("--config", "file", metavar="FILE.toml", required=True, help="A table per part: [zero-shot] …"),
    click.option("--data", metavar="SOURCE", help="Raw images of zero-shot and embedding. [as in the file]"),
    click.option("-o", "--output", metavar="FOLDER", help="Where results go. [as in the file]"),
    click.option("--device", help="cpu, cuda, cuda:1 … [as in the file]"),
)
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
    with _needs_packages():
        from datamerge.evaluation.all_parts import evaluate_all

    print_rows(evaluate_all(file, list(runs), data=data, output=output, device=device))


@contextmanager
def _needs_packages() -> Iterator[None]:
    """Imports that a smaller installation may lack."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"`datamerge evaluate` needs the package {error.name!r} for this: pip install 'datamerge[eval]'"
        ) from None


def _split(epsilons: str | None) -> list[str] | None:
    return None if epsilons is None else [part.strip() for part in epsilons.split(",")]


def _report(output: str, results: Sequence[ArmResult]) -> None:
    print_rows(write_reports(output, results[0].part, results))
    click.echo(f"{output}/report.html: table, pictures and settings")
