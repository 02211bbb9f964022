"""Vision towers for LLaVA: its own, a CLIP vision model of Hugging Face, or an open_clip encoder.

    own            LLaVA's own tower
    hf:…           an encoder spec of a CLIP vision model, or the folder of a run that trained one
    open_clip:…    likewise of a vision transformer with a class token

An open_clip tower gives LLaVA what FARE's evaluation gives it: the tokens of all patches after the layer
that LLaVA selects, for LLaVA-1.5 the last but one; the layers behind it do not run.

Shapes: B images, T tokens (class token first), D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from datamerge.encoders import load_encoder, parse_spec, refusals_about, weights_sha256, with_image_size
from datamerge.encoders.building import adapted, downloading
from datamerge.encoders.hugging_face import HuggingFaceTower, read_processor, resize_tower
from datamerge.evaluation.encoders_under_test import check_weights, load_trained
from datamerge.evaluation.llava.images import Fit, decisive
from datamerge.evaluation.runs import Run, read_run
from datamerge.evaluation.store import PREPROCESSING
from storage_schemas import ConfigError
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.run import BASELINE

OWN = "own"
HUGGING_FACE = "hf:"


@dataclass(frozen=True)
class Tower:
    """A vision tower and the preprocessing of its pixels.

    Attributes:
        module: takes normalised pixels [B, 3, S, S], returns `hidden_states` [B, T, D].
        width: D.
        patches: patch tokens of an image.
        preprocessing: from a photo to normalised pixels.
        sha256: hash of the weights, before position embeddings are resampled for another S.
    """

    module: nn.Module
    width: int
    patches: int
    preprocessing: Preprocessing
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
    """The run that the user named.

    Raises:
        ConfigError: the text is neither the folder of a run, nor an open_clip: or hf: spec, nor `own`.
    """
    if text == OWN or text.startswith(HUGGING_FACE):
        spec = str(Path(text))
        # The name is all that is known of the origin of a checkpoint.
        arm = BASELINE if text == OWN else f"{HUGGING_FACE}{Path(text.removeprefix(HUGGING_FACE)).name}"
        return Run(name=spec, encoder=spec, original=spec, arm=arm)
    run = read_run(text)
    if not run.encoder.startswith(("open_clip:", HUGGING_FACE)):
        raise ConfigError(
            f"runs: expected open_clip: or hf: encoders or own, which have patch tokens for LLaVA, found {text!r}, "
            f"which is {run.encoder!r}"
        )
    return run


def identify_tower(run: Run, fit: Fit) -> dict[str, Any]:
    """The facts that determine the results of a run of `read_tower_run`: hash of its weights, and its preprocessing.

    LLaVA's own tower needs no hash: all arms of a folder share the LLaVA model.

    Raises:
        ConfigError: no such model.
    """
    if run.encoder == OWN:
        return {"encoder_sha256": None}
    with refusals_about("runs"):
        encoder = load_trained(run.encoder, torch.device("cpu"))
    return {
        "encoder_sha256": _sha256(encoder.model),
        PREPROCESSING: decisive(encoder.preprocessing, fit).record(),
    }


def load_tower(run: Run, own: nn.Module, llava: str, layer: int, size: int) -> Tower:
    """The tower of a run, in float32 on the CPU.

    Args:
        run: from `read_tower_run`.
        own: LLaVA's own tower.
        llava: folder or hub name of LLaVA, whose image processor says what its own tower's pixels are.
        layer: index of the hidden state that LLaVA selects.
        size: side of its input in pixels, 0 for the native one.

    Raises:
        ConfigError: no such model, or one that cannot serve.
    """
    if run.encoder == OWN:
        return _own(own, llava, size)
    with refusals_about("runs"):
        encoder = load_encoder(run.encoder, aloud=False)
    if run.summary is not None:
        check_weights(run, encoder, run.summary.encoder_sha256)
    sha256 = _sha256(encoder.model)
    patch = _patch(encoder.model, run.name)
    if size not in (0, encoder.input_shape[1]):
        _check_size(size, patch)
        with refusals_about("runs"):
            encoder = load_encoder(with_image_size(run.encoder, size))
    model: Any = encoder.model
    if isinstance(model, HuggingFaceTower):
        return _hugging_face(model, encoder.preprocessing, sha256, run.name)
    width = int(model.conv1.out_channels)
    return Tower(
        OpenClipTower(model, layer), width, _patches(encoder.preprocessing, patch), encoder.preprocessing, sha256
    )


def _own(module: Any, llava: str, size: int) -> Tower:
    with refusals_about("llava"):
        spec = parse_spec(f"{HUGGING_FACE}{llava}")
        preprocessing = downloading(spec, lambda: read_processor(spec))
    tower = HuggingFaceTower(module)
    # Before the next line, because it may be stored in half precision.
    sha256 = _sha256(tower)
    tower.float()
    if size not in (0, native := int(tower.config.image_size)):
        _check_size(size, int(tower.config.patch_size))
        resize_tower(tower, (size, size))
    side = size or native
    return _hugging_face(tower, adapted(preprocessing, preprocessing, (side, side)), sha256, OWN)


def _hugging_face(tower: HuggingFaceTower, preprocessing: Preprocessing, sha256: str, name: str) -> Tower:
    """A vision model of transformers, if its tokens are those that LLaVA expects."""
    patches = _patches(preprocessing, int(tower.config.patch_size))
    with torch.no_grad():
        tokens = tower.vision_model(torch.zeros(1, *preprocessing.shape)).last_hidden_state.shape[1]
    if tokens != patches + 1:
        raise ConfigError(
            f"runs: expected a class token and {patches} of patches, as CLIP has, from {name!r}, found {tokens} "
            f"tokens of {type(tower.vision_model).__name__}; use a CLIP vision model"
        )
    return Tower(tower.vision_model, int(tower.config.hidden_size), patches, preprocessing, sha256)


def _patch(model: Any, name: str) -> int:
    """Side of the patches that a network cuts its pixels into.

    Raises:
        ConfigError: the network is no vision transformer with accessible tokens.
    """
    if isinstance(model, HuggingFaceTower):
        return int(model.config.patch_size)
    if not hasattr(model, "forward_intermediates") or not hasattr(getattr(model, "transformer", None), "resblocks"):
        raise ConfigError(
            f"runs: expected a vision transformer of open_clip with a class token in {name!r}, found "
            f"{type(model).__name__}"
        )
    return int(model.conv1.kernel_size[0])


def _check_size(size: int, patch: int) -> None:
    if size % patch:
        raise ConfigError(f"image_size: expected a multiple of the tower's patches of {patch} pixels, found {size}")


def _patches(preprocessing: Preprocessing, patch: int) -> int:
    height, width = preprocessing.size
    return (height // patch) * (width // patch)


def _sha256(model: nn.Module) -> str:
    """Hash of the weights that LLaVA uses; the projection behind a tower of transformers is not among them."""
    return weights_sha256(model.vision_model if isinstance(model, HuggingFaceTower) else model)
