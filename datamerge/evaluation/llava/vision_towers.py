"""Vision towers for LLaVA: its own, a Hugging Face CLIP vision model, or an open_clip encoder.

    own            the tower LLaVA came with
    hf:PATH        a folder or hub name of a CLIPVisionModel (or of a whole CLIPModel)
    open_clip:…    an encoder spec, or the folder of a run that trained one

An open_clip tower gives LLaVA what FARE's evaluation gives it (PAPER §4): the tokens of all patches after the layer
that LLaVA selects, for LLaVA-1.5 the last but one; the layers behind it do not run.

Shapes: B images, T tokens (class token first), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from datamerge.encoders import load_encoder, weights_sha256
from datamerge.evaluation.encoders_under_test import check_weights, load_trained
from datamerge.evaluation.runs import Run, read_run
from datamerge.runtime.messages import first_line
from storage_schemas import ConfigError
from storage_schemas.schema.run import BASELINE

# OpenAI's CLIP; LLaVA-1.5's own tower has the same.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
OWN = "own"
HUGGING_FACE = "hf:"


@dataclass(frozen=True)
class Tower:
    """A vision tower and what its pixels must look like.

    Attributes:
        module: takes normalised pixels [B, 3, S, S], returns `hidden_states` [B, T, D].
        width: D.
        size: S.
        patches: patch tokens of an image.
        mean, std: of the normalisation, per channel.
        sha256: hash of the weights.
    """

    module: nn.Module
    width: int
    size: int
    patches: int
    mean: Sequence[float]
    std: Sequence[float]
    sha256: str


class OpenClipTower(nn.Module):
    """An open_clip vision transformer behind the interface of Hugging Face's.

    Args:
        visual: open_clip's VisionTransformer.
        layer: the hidden state LLaVA selects, as an index into [embeddings, block 1, …, block L].
    """

    def __init__(self, visual: Any, layer: int) -> None:
        super().__init__()
        self.visual = visual
        self._layers = len(visual.transformer.resblocks)
        self._block = range(self._layers + 1)[layer] - 1
        if self._block < 0:
            raise ValueError("the embeddings are no layer")

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        """Hidden states with the selected one in its place, the others None."""
        found = self.visual.forward_intermediates(
            pixel_values,
            indices=[self._block],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        tokens = torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1)
        states: list[Tensor | None] = [None] * (self._layers + 1)
        states[self._block + 1] = tokens
        return transformers.modeling_outputs.BaseModelOutputWithPooling(hidden_states=cast(Any, tuple(states)))


def read_tower_run(text: str) -> Run:
    """A run from what the user typed.

    Raises:
        ConfigError: neither a run's folder, nor an open_clip spec, hf:PATH or own.
    """
    if text == OWN or text.startswith(HUGGING_FACE):
        spec = str(Path(text))
        # Whose work another checkpoint is, only its name can tell.
        arm = BASELINE if text == OWN else f"{HUGGING_FACE}{Path(text.removeprefix(HUGGING_FACE)).name}"
        return Run(name=spec, encoder=spec, original=spec, arm=arm)
    run = read_run(text)
    if not run.encoder.startswith("open_clip:"):
        raise ConfigError(
            f"runs: expected open_clip: encoders, hf:PATH or own, which have patch tokens for LLaVA, found {text!r}, "
            f"which is {run.encoder!r}"
        )
    return run


def tower_sha256(run: Run) -> str | None:
    """Hash of the weights that a run from `read_tower_run` has now; None for `own`, which only LLaVA holds.

    Raises:
        ConfigError: no such model.
    """
    if run.encoder == OWN:
        return None
    return weights_sha256(
        _clip_vision(run) if run.encoder.startswith(HUGGING_FACE) else load_encoder(run.encoder).model
    )


def load_tower(run: Run, own: nn.Module, layer: int, size: int) -> Tower:
    """The tower of a run, in float32 on the CPU.

    Args:
        run: from `read_tower_run`.
        own: LLaVA's own tower.
        layer: index of the hidden state that LLaVA selects.
        size: side of its input in pixels, 0 for the native one.

    Raises:
        ConfigError: no such model, or one that cannot serve.
    """
    if run.encoder == OWN:
        return _hugging_face(own, size, CLIP_MEAN, CLIP_STD)
    if run.encoder.startswith(HUGGING_FACE):
        return _hugging_face(_clip_vision(run), size, *_pixel_statistics(run.encoder.removeprefix(HUGGING_FACE)))
    return _open_clip(run, layer, size)


def _open_clip(run: Run, layer: int, size: int) -> Tower:
    encoder = load_trained(run.encoder, torch.device("cpu"))
    if run.summary is not None:
        check_weights(run, encoder, run.summary.encoder_sha256)
    visual: Any = encoder.model
    if not hasattr(visual, "forward_intermediates") or not hasattr(getattr(visual, "transformer", None), "resblocks"):
        raise ConfigError(
            f"runs: expected a vision transformer of open_clip in {run.name!r}, found {type(visual).__name__}"
        )
    native = encoder.input_shape[1]
    if size not in (0, native):
        raise ConfigError(
            f"image_size: expected {native}, the size of {encoder.spec}, or 0, found {size}; use a model of that size"
        )
    patch = int(visual.conv1.kernel_size[0])
    return Tower(
        OpenClipTower(visual, layer),
        int(visual.conv1.out_channels),
        native,
        (native // patch) ** 2,
        encoder.mean.flatten().tolist(),
        encoder.std.flatten().tolist(),
        encoder.sha256,
    )


def _clip_vision(run: Run) -> Any:
    name = run.encoder.removeprefix(HUGGING_FACE)
    try:
        return transformers.CLIPVisionModel.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"runs: expected a CLIP vision model of Hugging Face at {name!r}, found {first_line(error)}"
        ) from None


def _hugging_face(module: Any, size: int, mean: Sequence[float], std: Sequence[float]) -> Tower:
    config = module.config
    native, patch = int(config.image_size), int(config.patch_size)
    sha256 = weights_sha256(module)
    if size not in (0, native):
        if size % patch:
            raise ConfigError(
                f"image_size: expected a multiple of the tower's patches of {patch} pixels, found {size}"
            )
        _resize_positions(module, native // patch, size // patch)
    side = (size or native) // patch
    return Tower(module, int(config.hidden_size), size or native, side**2, mean, std, sha256)


def _resize_positions(module: Any, before: int, after: int) -> None:
    """Interpolate the position embeddings of a square of patches (bicubic), as Hugging Face does at run time."""
    embeddings = module.embeddings
    weight = embeddings.position_embedding.weight.detach()
    square = weight[1:].T.reshape(1, -1, before, before)
    resized = nn.functional.interpolate(square, size=(after, after), mode="bicubic", align_corners=False)
    table = torch.cat([weight[:1], resized.flatten(2)[0].T])
    embeddings.position_embedding = nn.Embedding.from_pretrained(table)
    embeddings.num_patches, embeddings.num_positions = after**2, len(table)
    embeddings.image_size = after * int(embeddings.patch_size)
    embeddings.register_buffer("position_ids", torch.arange(len(table))[None], persistent=False)


def _pixel_statistics(name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation that a checkpoint's image processor normalises with; CLIP's without one."""

    try:
        processor = transformers.CLIPImageProcessor.from_pretrained(name)
    except (OSError, ValueError):
        return CLIP_MEAN, CLIP_STD
    return list(processor.image_mean), list(processor.image_std)
