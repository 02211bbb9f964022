"""Loads text towers of open_clip's models, and of CLIP and SigLIP in Hugging Face transformers.

The text tower of a spec is that in its file of weights, if the file holds one; else that of its tag, folder or
repository, because image towers are tuned towards a frozen text tower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from datamerge.encoders.building import downloading, reason, seeded
from datamerge.encoders.checkpoints import as_trained, read_state_dict
from datamerge.encoders.hugging_face import transformers_for
from datamerge.encoders.open_clip_models import known_open_clip, of_hub
from datamerge.encoders.specs import HUB, EncoderSpec
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError

# Prefixes of a text tower in a file: of CLIP, of open_clip's custom text towers, of MobileCLIP, of transformers.
TEXTS = ("token_embedding.", "text.", "text_encoder.", "text_model.")
BIG_VISION = ".npz"
# Parts of an open_clip model that do not process class names: the image tower, and CoCa's decoder of captions.
CAPTIONS = "text_decoder"
OTHER_PARTS = ("visual", CAPTIONS)
# A tiny image tower in place of the real one.
NO_IMAGES = {"image_size": 8, "patch_size": 8, "width": 64, "layers": 1}
# `model_type` of a configuration → class of the whole model.
WHOLE = {"clip": "CLIPModel", "siglip": "SiglipModel"}


@dataclass(frozen=True)
class TextTower:
    """A text tower: texts → embeddings in the joint space with images.

    Attributes:
        model: model with the interface of open_clip: `encode_text(tokens, normalize)`, `logit_scale` and perhaps
            `logit_bias`.
        tokenizer: converts texts to the tokens that `encode_text` takes.
        configuration: configuration of the computation, as JSON.
    """

    model: Any
    tokenizer: Callable[[Sequence[str]], Any]
    configuration: Mapping[str, Any]

    @property
    def scale(self) -> Tensor:
        """Factor of the cosines, [1]."""
        return cast(Tensor, self.model.logit_scale.detach().exp().reshape(1).float())

    @property
    def bias(self) -> Tensor | None:
        """Bias of all logits, [1], for SigLIP; None for others."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else cast(Tensor, bias.detach().reshape(1).float())


def load_text_tower(spec: EncoderSpec) -> TextTower:
    """The text tower that belongs to an encoder of kind open_clip or hf, in eval mode.

    Raises:
        ConfigError: there is none, or its weights, configuration or tokeniser cannot be loaded.
    """
    make_torchvision_importable()
    tower = _hugging_face(spec) if spec.kind == "hf" else _open_clip(spec)
    tower.model.eval().requires_grad_(False)
    return tower


def _open_clip(spec: EncoderSpec) -> TextTower:
    import open_clip

    spec = known_open_clip(as_trained(spec))
    model = open_clip_texts(spec)
    tokenizer = _fetched(spec, "the tokeniser", lambda: open_clip.get_tokenizer(spec.model))
    configuration = {
        name: value for name, value in open_clip.get_model_config(spec.model).items() if name != "vision_cfg"
    }
    return TextTower(model, tokenizer, configuration)


def open_clip_texts(spec: EncoderSpec, captions: bool = False) -> Any:
    """A model of open_clip without its image tower: the text tower of an encoder, with scale and bias.

    Args:
        spec: spec of the encoder, from `known_open_clip`.
        captions: keep CoCa's decoder of captions too.

    Raises:
        ConfigError: there is none, or its weights or configuration cannot be loaded.
    """
    import open_clip

    texts = _texts_of_file(spec)
    # A whole model in JAX's format, which only open_clip reads.
    archive = spec.checkpoint if spec.checkpoint and spec.checkpoint.endswith(BIG_VISION) else None
    if spec.checkpoint and texts is None and not (archive or spec.has_weights):
        raise ConfigError(
            f"encoder: expected a text tower in {spec.checkpoint}, found only an image tower; name the weights that "
            f"it was tuned from, for their text tower: {spec.kind}:{spec.model}/TAG"
        )
    configuration = downloading(spec, lambda: open_clip.get_model_config(spec.model))

    def create() -> Any:
        if texts is not None:
            options: dict[str, Any] = {"load_weights": False, "pretrained_text": False, "vision_cfg": NO_IMAGES}
        elif archive or spec.has_weights:
            options = {"pretrained": archive or spec.pretrained, "require_pretrained": True}
        else:
            options = {}
        of_revision = spec.model.startswith(HUB) and (spec.revision or texts is not None)
        return open_clip.create_model(of_hub(spec) if of_revision else spec.model, **options)

    with seeded():
        if "hf_model_name" in configuration["text_cfg"]:
            model = _fetched(spec, f"the text tower {configuration['text_cfg']['hf_model_name']}", create)
        else:
            model = downloading(spec, create)
    for part in OTHER_PARTS:
        if hasattr(model, part) and not (captions and part == CAPTIONS):
            delattr(model, part)
    if texts is not None:
        _load(model, _as_open_clip(model, texts), spec)
    return model


def _texts_of_file(spec: EncoderSpec) -> dict[str, Tensor] | None:
    """Tensors of the file of a spec, if they include a text tower."""
    if spec.checkpoint is None or spec.checkpoint.endswith(BIG_VISION):
        return None
    tensors = read_state_dict(Path(spec.checkpoint))
    return dict(tensors) if any(name.startswith(TEXTS) for name in tensors) else None


def _as_open_clip(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert names and shapes to those of a model, as open_clip does when it loads whole models."""
    from open_clip import factory

    state = factory.convert_state_dict(model, state)
    if not hasattr(model, "positional_embedding"):
        state = factory.convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        own = getattr(model, name, None)
        if own is not None and name in state:
            state[name] = state[name].reshape(own.shape)
    if getattr(model, "logit_bias", None) is not None and "logit_scale" in state:
        state.setdefault("logit_bias", torch.zeros_like(model.logit_bias))
    with suppress(AssertionError):  # another width does not fit; `_load` reports it
        factory.resize_text_pos_embed(state, model)
    return state


def _load(model: nn.Module, state: Mapping[str, Tensor], spec: EncoderSpec) -> None:
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    wrong = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    if missing or wrong:
        problem = f"no {missing[0]!r}" if missing else f"another shape of {wrong[0]!r}"
        raise ConfigError(
            f"encoder: expected the text tower of {spec.named} in {spec.checkpoint}, found {problem} ({len(missing)} "
            f"tensors missing, {len(wrong)} of another shape); name the weights whose text tower it uses"
        )
    model.load_state_dict({name: state[name] for name in own})


class HuggingFaceTexts(nn.Module):
    """A model of transformers with the interface of open_clip for texts."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.logit_scale = model.logit_scale
        self.logit_bias = getattr(model, "logit_bias", None)

    def encode_text(self, tokens: Mapping[str, Tensor], normalize: bool = False) -> Tensor:
        """Embeddings [B, K] of tokens, with length 1 if `normalize`."""
        found = self.model.get_text_features(**tokens)
        # An output object since transformers 5.
        features = cast(Tensor, getattr(found, "pooler_output", found))
        return nn.functional.normalize(features, dim=-1) if normalize else features


def _hugging_face(spec: EncoderSpec) -> TextTower:
    transformers = transformers_for(spec)
    where: dict[str, Any] = {"trust_remote_code": False, **({"revision": spec.revision} if spec.revision else {})}
    config = downloading(spec, lambda: transformers.AutoConfig.from_pretrained(spec.model, **where))
    name = WHOLE.get(config.model_type)
    if name is None:
        raise ConfigError(
            f"encoder: expected a whole CLIP or SigLIP, with its text tower, at '{spec}', found a "
            f"{config.model_type}; name the model that it was tuned from, such as hf:openai/clip-vit-large-patch14"
        )
    kind = getattr(transformers, name)
    texts = _texts_of_file(spec)
    if texts is None:
        model, found = downloading(
            spec, lambda: kind.from_pretrained(spec.model, config=config, output_loading_info=True, **where)
        )
        lacking = sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"]))
        if lacking:
            raise ConfigError(f"encoder: expected weights of {name} at '{spec}', found none that fit {lacking[0]}")
    else:
        model = kind(config)
    for part in ("vision_model", "visual_projection"):
        if hasattr(model, part):
            delattr(model, part)
    if texts is not None:
        _load(model, texts, spec)
    tokenizer = _fetched(spec, "the tokeniser", lambda: _tokenizer(spec, where))
    length = config.text_config.max_position_embeddings

    def tokens(texts: Sequence[str]) -> Any:
        # SigLIP pools the last position, and was trained on padded texts.
        padding = "max_length" if config.model_type == "siglip" else True
        return tokenizer(list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt")

    text_config = {name: value for name, value in config.text_config.to_dict().items() if name[0] != "_"}
    return TextTower(HuggingFaceTexts(model.float()), tokens, {"model_type": config.model_type, "text": text_config})


def _tokenizer(spec: EncoderSpec, where: Mapping[str, Any]) -> Any:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(spec.model, **where)
    # Without files, transformers makes a tokeniser without words.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise OSError(f"no files of a tokeniser in {Path(spec.model)}")
    return tokenizer


def _fetched(spec: EncoderSpec, what: str, create: Callable[[], Any]) -> Any:
    """Run a constructor of a part that a text tower needs besides its weights; `what` names the part.

    Raises:
        ConfigError: the part cannot be loaded; the message says how to do without it.
    """
    try:
        return downloading(spec, create)
    except ConfigError as refusal:
        error = refusal.__cause__ or refusal
        words = reason(error).partition(". ")[0]
        raise ConfigError(
            f"encoder: expected {what} for '{spec}', found none ({type(error).__name__}: {words}); on a connected "
            "machine, make the head with datamerge.load_head, write its `to_bytes` to a .safetensors file, and name "
            "that file"
        ) from error
