"""`datamerge export-encoder`: a trained encoder in the files that other libraries load.

    open_clip   OUT/visual.pt                state_dict of `model.visual`; RobustVLM and stock open_clip load it
    hf          OUT/config.json, model.safetensors, preprocessor_config.json: a CLIPVisionModelWithProjection

Either way OUT/README.md is a model card that says which artifact and arm the weights come from.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import torch
from pydantic import Field
from torch import Tensor

from datamerge.encoders import Encoder, load_encoder, parse_spec, refusals_about, weights_sha256
from datamerge.encoders.runs import spec_of_run
from datamerge.encoders.torchvision_ops import make_torchvision_importable
from datamerge.runtime import Settings, load_settings, local_path
from datamerge.runtime.options import HELP_FLAGS, Option, options
from storage_schemas import ConfigError, DatamergeError
from storage_schemas.schema.run import WEIGHTS, RunSummary, read_summary
from trainer.export.hf_clip import clip_config, clip_state_dict
from trainer.run.checkpoint import BEST, read_state

Target = Literal["open_clip", "hf"]
# An exported network must give the embeddings of the one it was made from.
TOLERANCE = 1e-5


class ExportConfig(Settings):
    """Settings of `datamerge export-encoder`."""

    run: Annotated[str, Option(argument=True)] = Field(description="Folder of a finished training run.", min_length=1)
    to: Target = Field(description="Library that is to load the encoder.")
    output: Annotated[str, Option(alias="-o", metavar="OUT")] = Field(
        description="New folder for the files.", min_length=1
    )
    best: bool = Field(
        default=False, description="Take the state with the lowest held-out loss instead of the last one."
    )


@click.command("export-encoder", context_settings=HELP_FLAGS)
@options(ExportConfig)
def export_encoder(**flags: Any) -> None:
    """Write the encoder of the finished training RUN for open_clip or Hugging Face transformers.

    \b
    datamerge export-encoder runs/avg --to open_clip -o exported/avg
    datamerge export-encoder runs/avg --to hf -o exported/avg-hf
    """
    config = load_settings(ExportConfig, None, flags)
    click.echo(export(config.run, config.to, config.output, best=config.best))


def export(run: str, to: Target, output: str, *, best: bool = False) -> Path:
    """Export the encoder of a run; see the module's docstring.

    Args:
        run: folder of a finished run.
        to: which library's files.
        output: a folder that does not exist yet; it appears whole or not at all.
        best: take the checkpoint with the lowest held-out loss.

    Returns:
        The folder.

    Raises:
        ConfigError: an unfinished run, an encoder that the target has no form for, or an existing folder.
        DatamergeError: the exported network would not give the same embeddings.
    """
    out = local_path(output, "output")
    if out.exists():
        raise ConfigError(f"output: expected a new folder, found {output}, which exists; choose another `output`")
    folder = local_path(run, "run")
    summary = read_summary(folder)
    encoder = _encoder(folder, summary, best)
    write: Callable[[Encoder, Path], str] = _write_open_clip if to == "open_clip" else _write_hf
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as name:
        files = Path(name) / "files"
        files.mkdir()
        usage = write(encoder, files)
        (files / "README.md").write_text(_model_card(summary, encoder, to, usage, best), "utf-8")
        shutil.move(files, out)
    return out


def _encoder(folder: Path, summary: RunSummary, best: bool) -> Encoder:
    """The trained encoder, with the normalisation it was trained with."""
    with refusals_about("run"):
        encoder = load_encoder(spec_of_run(summary, folder))
    if not best:
        if encoder.sha256 != summary.encoder_sha256:
            raise DatamergeError(f"{folder}: the encoder's weights are not those of run.json; the run is damaged")
        return encoder
    path = folder / "checkpoints" / BEST
    if not path.exists():
        raise ConfigError(f"best: expected {path}, found none; a run keeps it when it is given `eval_artifact`")
    state = read_state(path, torch.device("cpu"))
    average = state["average"]
    weights = state["model"] if average is None else _without_prefix(average, "module.")
    encoder.load_state_dict(weights)
    return encoder


def _without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _write_open_clip(encoder: Encoder, files: Path) -> str:
    spec = parse_spec(encoder.spec)
    if spec.kind != "open_clip":
        raise ConfigError(
            f"to: open_clip expects an open_clip encoder, found {encoder.spec!r}; use the run's {WEIGHTS} itself"
        )
    # The file that RobustVLM reads: a plain state_dict, not safetensors.
    torch.save(
        {name: tensor.contiguous() for name, tensor in encoder.model.state_dict().items()}, files / "visual.pt"
    )
    return (
        "import open_clip, torch\n\n"
        f'model, _, preprocess = open_clip.create_model_and_transforms("{spec.model}")\n'
        'model.visual.load_state_dict(torch.load("visual.pt", weights_only=True))\n'
    )


def _write_hf(encoder: Encoder, files: Path) -> str:
    config = clip_config(encoder)
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("to: hf needs the package 'transformers': pip install 'datamerge[export]'")
    # transformers imports torchvision wherever that is installed.
    make_torchvision_importable()
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    model: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    missing, unexpected = model.load_state_dict(clip_state_dict(encoder.model), strict=False)
    left = [name for name in [*missing, *unexpected] if not name.endswith("position_ids")]
    if left:
        raise DatamergeError(
            f"this version of transformers ({version('transformers')}) names parameters otherwise: {left[0]}"
        )
    model.eval()
    _check_equal(encoder, lambda pixels: model(pixel_values=(pixels - encoder.mean) / encoder.std).image_embeds)
    model.save_pretrained(files)
    size = encoder.input_shape[1]
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": encoder.mean.flatten().tolist(),
        "image_std": encoder.std.flatten().tolist(),
    }
    (files / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n", "utf-8")
    return (
        "from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection\n\n"
        'model = CLIPVisionModelWithProjection.from_pretrained("this folder")\n'
        'processor = CLIPImageProcessor.from_pretrained("this folder")\n'
        "embeddings = model(**processor(images, return_tensors='pt')).image_embeds  # not normalised\n"
    )


def _check_equal(encoder: Encoder, exported: Callable[[Tensor], Tensor]) -> None:
    """Compare embeddings of two images; the largest difference relative to the largest value."""
    pixels = torch.rand((2, *encoder.input_shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = encoder(pixels), exported(pixels)
    difference = float((expected - found).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise DatamergeError(
            f"encoder {encoder.spec!r}: the exported network's embeddings differ by {difference:.2g} (relative), "
            f"expected at most {TOLERANCE}; nothing was written"
        )


def _model_card(summary: RunSummary, encoder: Encoder, target: Target, usage: str, best: bool) -> str:
    library = {"open_clip": "open_clip", "hf": "transformers"}[target]
    exported = f"; this export, with the lowest held-out loss: `{weights_sha256(encoder.model)}`"
    note = exported if best else ""
    settings = "\n".join(
        f"| {name} | `{value}` |" for name, value in summary.config.items() if value not in (None, [])
    )
    return f"""---
library_name: {library}
tags: [adversarial-robustness, clip, vision]
---

# {Path(summary.original.partition(":")[2]).name}, {summary.arm}

An image encoder, fine-tuned from `{summary.original}` on precomputed groups of adversarial images
(arm **{summary.arm}**), exported by datamerge {version("datamerge")}.

| provenance | |
|---|---|
| artifact | `{summary.artifact}` |
| artifact plan, sha256 | `{summary.plan_sha256}` |
| weights before training, sha256 | `{summary.original_sha256}` |
| weights after training, sha256 | `{summary.encoder_sha256}`{note} |
| optimiser steps | {summary.steps} |
| groups seen | {summary.groups} |

```python
{usage}```

Pixels are [0, 1], resized bicubically and centre-cropped, then normalised with the encoder's own mean and deviation.

| setting | value |
|---|---|
{settings}
"""
