"""The command `datamerge export-encoder`: writes a trained encoder and its preprocessing for another library.

    open_clip   visual.pt for RobustVLM, and a folder for `local-dir:` and `hf-hub:` of open_clip
    hf          a folder for `from_pretrained` of transformers
    timm        a folder for `local-dir:` and `hf-hub:` of timm

README.md is a model card with the artifact and the arm that the weights come from. Before the folder appears, the
library loads the files, and its pixels and embeddings are compared with the encoder's.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import click
from pydantic import Field
from torch import Tensor

from datamerge.encoders import Encoder, load_encoder, refusals_about
from datamerge.encoders.runs import spec_of_run, started_from
from datamerge.runtime import Settings, load_settings, local_path
from datamerge.runtime.options import HELP_FLAGS, Option, options
from storage_schemas import ConfigError, DatamergeError
from storage_schemas.access.atomic import writing
from storage_schemas.schema.run import RunSummary, read_summary
from trainer.export.hugging_face_folder import write_hugging_face
from trainer.export.kinds import Folder
from trainer.export.model_card import model_card
from trainer.export.open_clip_folder import write_open_clip
from trainer.export.timm_folder import write_timm
from trainer.run.checkpoint import BEST, read_state

Target = Literal["open_clip", "hf", "timm"]
# By target: a function that writes an encoder into an empty folder.
WRITERS: Mapping[Target, Callable[[Encoder, Path], Folder]] = {
    "open_clip": lambda encoder, files: write_open_clip(encoder, started_from(encoder.spec), files),
    "hf": write_hugging_face,
    "timm": write_timm,
}


class ExportConfig(Settings):
    """Settings of `datamerge export-encoder`."""

    run: Annotated[str, Option(argument=True)] = Field(description="Folder of a finished training run.", min_length=1)
    to: Target = Field(description="Library that will load the encoder.")
    output: Annotated[str, Option(alias="-o", metavar="OUT")] = Field(
        description="New folder for the files.", min_length=1
    )
    best: bool = Field(
        default=False, description="Take the state with the lowest held-out loss instead of the last one."
    )


@click.command("export-encoder", context_settings=HELP_FLAGS)
@options(ExportConfig)
def export_encoder(**flags: Any) -> None:
    """Write the encoder of the finished training RUN for open_clip, Hugging Face transformers or timm.

    \b
    datamerge export-encoder runs/avg --to open_clip -o exported/avg
    datamerge export-encoder runs/avg --to hf -o exported/avg-hf
    """
    config = load_settings(ExportConfig, None, flags)
    click.echo(export(config.run, config.to, config.output, best=config.best))


def export(run: str, to: Target, output: str, *, best: bool = False) -> Path:
    """Export the encoder of a run for another library.

    Args:
        run: folder of a finished run.
        to: the library.
        output: a new folder, written atomically.
        best: export the state with the lowest held-out loss instead of the last one.

    Returns:
        Path of the folder.

    Raises:
        ConfigError: the run is unfinished, the library cannot express the encoder, or the folder exists.
        DatamergeError: the library computes other pixels or embeddings, or the disk is full.
    """
    out = local_path(output, "output")
    if out.exists():
        raise ConfigError(f"output: expected a new folder, found {output}, which exists; choose another `output`")
    place = local_path(run, "run")
    summary = read_summary(place, "run")
    encoder = _encoder(place, summary, best)
    out.parent.mkdir(parents=True, exist_ok=True)
    with writing(out), tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as name:
        files = Path(name) / "files"
        files.mkdir()
        folder = WRITERS[to](encoder, files)
        (files / "README.md").write_text(model_card(summary, encoder, to, folder, best), "utf-8")
        shutil.move(files, out)
    return out


def _encoder(folder: Path, summary: RunSummary, best: bool) -> Encoder:
    """Load the trained encoder with its preprocessing."""
    with refusals_about("run"):
        encoder = load_encoder(spec_of_run(summary, folder))
    if not best:
        if encoder.sha256 != summary.encoder_sha256:
            raise DatamergeError(f"{folder}: the encoder's weights are not those of run.json; the run is damaged")
        return encoder
    path = folder / "checkpoints" / BEST
    if not path.exists():
        raise ConfigError(f"best: expected {path}, found none; train with `eval_artifact`, or drop `best`")
    state = read_state(path)
    average = state["average"]
    weights = state["model"] if average is None else _without_prefix(average, "module.")
    encoder.load_state_dict(weights)
    return encoder


def _without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
