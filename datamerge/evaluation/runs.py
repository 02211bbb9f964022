"""What can be evaluated: the folder of a finished training run, or an encoder spec as the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datamerge.encoders import parse_spec, refusals_about
from datamerge.encoders.runs import spec_of_run, with_tag_of_run
from datamerge.encoders.specs import KINDS
from storage_schemas import ConfigError
from storage_schemas.access.local_paths import user_path
from storage_schemas.schema.run import BASELINE, RunSummary, read_summary


@dataclass(frozen=True)
class Run:
    """An encoder with where it comes from.

    Attributes:
        name: as the user gave it, without a slash at the end.
        encoder: spec of the encoder to evaluate.
        original: spec of the encoder it started from.
        arm: row of the experiment.
        summary: what the training says of itself, None for a spec.
    """

    name: str
    encoder: str
    original: str
    arm: str = BASELINE
    summary: RunSummary | None = None


def read_run(text: str) -> Run:
    """The run that the user named by its folder, which holds `run.json`, or by an encoder spec.

    Raises:
        ConfigError: the text is neither, or the run is unfinished or damaged.
    """
    folder = user_path(text)
    if folder.is_dir():
        with refusals_about("runs"):
            summary = read_summary(folder)
            encoder, original = spec_of_run(summary, folder), with_tag_of_run(summary.original)
        return Run(str(Path(text)), encoder, original, summary.arm, summary)
    if text.partition(":")[0] not in KINDS:
        raise ConfigError(
            f"runs: expected the folder of a training run or an encoder spec such as timm:resnet18, found {text!r}, "
            f"{'a file' if folder.exists() else 'no such folder'}"
        )
    with refusals_about("runs"):
        parse_spec(text)
        encoder = with_tag_of_run(text)
    return Run(name=text, encoder=encoder, original=encoder)
