"""Encoders as modules that take [0, 1] pixels, with resize-free normalisation inside.

Shapes: B batch, C H W pixels, K embedding.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from datamerge.encoders.specs import EncoderSpec, parse_spec
from datamerge.encoders.torchvision_ops import make_torchvision_importable
from datamerge.runtime.factories import NoFactory, find_factory
from datamerge.runtime.messages import first_line
from storage_schemas import ConfigError, Location, shortened

# Seed of networks without weights: part of what their spec means.
RANDOM_WEIGHTS_SEED = 0
# Largest mlp, 8 GB: a spec may come from somebody else's artifact, and a few letters of it could fill any memory.
MAX_WEIGHTS = 2**31


class Encoder(nn.Module):
    """A network f_θ: pixels [B, C, H, W] in [0, 1] → embeddings [B, K].

    Attributes:
        model: the network on normalised pixels.
        spec: the spec it was made from.
        input_shape: (C, H, W) it takes.
        embedding_dim: K.
        sha256: hash of the weights it was loaded with.
        random_weights: whether nobody trained it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        spec: str,
        input_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        random_weights: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.input_shape = input_shape
        self.random_weights = random_weights
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.sha256 = weights_sha256(model)
        self.eval()
        self.embedding_dim = self._probe()

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings [B, K], un-normalised, of pixels [B, C, H, W] in [0, 1]."""
        return cast(Tensor, self.model((pixels - self.mean) / self.std))

    def _probe(self) -> int:
        """Width of the output, from one grey image."""
        with torch.no_grad():
            try:
                output = self(torch.full((1, *self.input_shape), 0.5))
            except (RuntimeError, ValueError, TypeError) as error:
                raise ConfigError(
                    f"encoder: expected a network on pixels {self.input_shape}, {self.spec!r} fails with: "
                    f"{first_line(error)}"
                ) from error
        if not isinstance(output, Tensor) or output.ndim != 2:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ConfigError(f"encoder: expected embeddings [1, K] of {self.spec!r}, found {found}")
        return int(output.shape[1])


def load_encoder(spec: str, device: str = "cpu") -> Encoder:
    """Build the encoder of a spec (see `datamerge.encoders.specs`), in eval mode.

    Raises:
        ConfigError: an unknown model or tag, weights that cannot be read or do not fit.
    """
    parsed = parse_spec(spec)
    if parsed.kind == "open_clip":
        parsed = known_open_clip(parsed)
    build = {"open_clip": _open_clip, "timm": _timm, "mlp": _mlp, "python": _python}[parsed.kind]
    with seeded():
        model, shape, mean, std = build(parsed)
    if parsed.checkpoint:
        _load_checkpoint(model, parsed)
    random_weights = parsed.pretrained is None and parsed.checkpoint is None and parsed.kind != "python"
    return Encoder(_channels_last(model), str(parsed), shape, mean, std, random_weights).to(device)


def _channels_last(model: nn.Module) -> nn.Module:
    """The same network with the weights of its convolutions in channels-last memory order, in which they run faster.

    It is a tenth to a fifth faster from the second convolution on (`python -m benchmarks.pgd`: the floor
    as built over the floor); a vision transformer has one, which cuts the image into patches.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if len(convolutions) > 1:
        for convolution in convolutions:
            convolution.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


@contextmanager
def seeded() -> Iterator[None]:
    """Random weights built in here are those that a spec without weights means."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        yield


def weights_sha256(module: nn.Module) -> str:
    """Hash of all parameters and buffers: names, dtypes, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_encoder(encoder: Encoder, path: str | os.PathLike[str]) -> None:
    """Write the network's weights as safetensors, atomically; the file serves as CHECKPOINT of a spec."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.model.state_dict().items()}
    target = Path(path).absolute()
    Location(target.parent).write(target.name, save(tensors))


Built = tuple[nn.Module, tuple[int, int, int], Sequence[float], Sequence[float]]


def _open_clip(spec: EncoderSpec) -> Built:
    import open_clip

    model = downloading(spec, lambda: open_clip.create_model(spec.model, pretrained=spec.pretrained))
    visual: Any = model.visual
    size = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size,) * 2
    mean = getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    return visual, (3, *size), mean, std


def known_open_clip(spec: EncoderSpec) -> EncoderSpec:
    """The spec, if open_clip knows model and tag, with the activation that the weights were trained with in its name.

    OpenAI's and a few other weights need QuickGELU. Asked for the plain model, open_clip only warns and runs it with
    GELU; and a spec of fine-tuned weights has the model's name alone to say which of the two it is.

    Raises:
        ConfigError: an unknown model or tag.
    """
    make_torchvision_importable()
    import open_clip

    known = open_clip.list_models()
    if spec.model not in known:
        raise ConfigError(_unknown("open_clip model", spec.model, known))
    if spec.pretrained and (spec.model, spec.pretrained) not in open_clip.list_pretrained():
        tags = [tag for model, tag in open_clip.list_pretrained() if model == spec.model]
        raise ConfigError(_unknown(f"weights of open_clip {spec.model}", spec.pretrained, tags))
    quick = f"{spec.model}-quickgelu"
    config = open_clip.get_pretrained_cfg(spec.model, spec.pretrained) if spec.pretrained else {}
    return replace(spec, model=quick) if config.get("quick_gelu") and quick in known else spec


def _timm(spec: EncoderSpec) -> Built:
    make_torchvision_importable()
    import timm
    from timm.data.config import resolve_model_data_config

    name = timm_name(spec)
    model = downloading(spec, lambda: timm.create_model(name, pretrained=bool(spec.pretrained), num_classes=0))
    config = resolve_model_data_config(model)
    return model, tuple(config["input_size"]), config["mean"], config["std"]


def timm_name(spec: EncoderSpec) -> str:
    """Model and tag as timm spells them; raises ConfigError for unknown ones."""
    import timm

    if not timm.is_model(spec.model):
        raise ConfigError(_unknown("timm model", spec.model, timm.list_models()))
    name = spec.model
    if spec.pretrained and spec.pretrained != "pretrained":
        name = f"{spec.model}.{spec.pretrained}"
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{spec.model}.*")]
        if spec.pretrained not in tags:
            raise ConfigError(_unknown(f"weights of timm {spec.model}", spec.pretrained, tags))
    return name


def _mlp(spec: EncoderSpec) -> Built:
    text = spec.model
    match = re.fullmatch(r"(N)x(N)x(N)((?:-N){1,999})".replace("N", "[1-9][0-9]{0,9}"), text)
    if not match:
        raise ConfigError(
            f"encoder: expected mlp:CxHxW-HIDDEN-…-OUT, e.g. mlp:1x28x28-512-10, found {shortened(f'mlp:{text}')}"
        )
    shape = (int(match[1]), int(match[2]), int(match[3]))
    widths = [math.prod(shape), *(int(width) for width in match[4][1:].split("-"))]
    weights = sum((before + 1) * after for before, after in pairwise(widths))
    if weights > MAX_WEIGHTS:
        raise ConfigError(
            f"encoder: expected at most {MAX_WEIGHTS} weights, found {weights} in {shortened(f'mlp:{text}')}; "
            "choose smaller layers"
        )
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), shape, [0.5] * shape[0], [0.5] * shape[0]


def _python(spec: EncoderSpec) -> Built:
    try:
        factory = find_factory(spec.model)
    except NoFactory as error:
        raise ConfigError(f"encoder: {error} ('{spec}')") from None
    model = factory()
    shape = getattr(model, "input_shape", None)
    if not isinstance(model, nn.Module) or shape is None or len(shape) != 3:
        raise ConfigError(
            f"encoder: expected a torch.nn.Module on [0, 1] pixels with an attribute input_shape = (C, H, W) from "
            f"'{spec}', found {type(model).__name__} with input_shape {shape}"
        )
    return model, (int(shape[0]), int(shape[1]), int(shape[2])), [0.0], [1.0]


def downloading(spec: EncoderSpec, create: Callable[[], Any]) -> nn.Module:
    """Run a constructor that may download weights.

    Raises:
        ConfigError: a download failed; the message says how to do without.
    """
    # The libraries log missing weights and every retry; what matters is said below, once.
    logging.disable(logging.ERROR)
    try:
        return cast(nn.Module, create())
    except Exception as error:  # every hub client has its own exceptions
        if spec.pretrained is None:
            raise
        raise ConfigError(
            f"encoder: expected to fetch the weights {spec.pretrained!r} of '{spec}', found no way to "
            f"({type(error).__name__}); download them on a connected machine and pass "
            f"{spec.kind}:{spec.model}@FILE"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def _load_checkpoint(model: nn.Module, spec: EncoderSpec) -> None:
    path = Path(spec.checkpoint or "")
    state = read_state_dict(path)
    own = model.state_dict()
    # A full CLIP checkpoint holds the image tower under `visual.`; a classifier's head is not the encoder's.
    if not own.keys() <= state.keys() and any(name.startswith("visual.") for name in state):
        state = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    missing = sorted(own.keys() - state.keys())
    wrong = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or wrong:
        problem = f"has no {missing[0]!r}" if missing else f"has another shape for {sorted(wrong)[0]!r}"
        raise ConfigError(
            f"encoder: expected weights of {spec.kind}:{spec.model}, {path} {problem} "
            f"({len(missing)} tensors missing, {len(wrong)} of another shape)"
        )
    try:
        model.load_state_dict({name: state[name] for name in own})
    except RuntimeError:
        raise ConfigError(
            f"encoder: expected plain tensors in {path}, found some that cannot be copied (sparse, quantised or "
            "without data)"
        ) from None


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """Tensors of a `.safetensors` or torch file, without executing anything in it.

    Raises:
        ConfigError: not such a file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise ConfigError(f"encoder: {path} is no weights file: {first_line(error)}") from None
    except Exception as error:  # pickle.UnpicklingError and friends
        raise ConfigError(
            f"encoder: expected plain tensors in {path}, found other objects: {type(error).__name__}"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        found = "other names or values in it" if isinstance(state, dict) else type(state).__name__
        raise ConfigError(f"encoder: expected a state_dict in {path}, found {found}")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"; did you mean {', '.join(close)}?" if close else f"; there are {len(known)} known ones"
    return f"encoder: unknown {what} {name!r}{hint}"
