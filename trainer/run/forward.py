"""The forward pass in training: encoder, frozen head, bfloat16, compilation and frozen layers.

Shapes: B groups, C H W pixels, K outputs.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from datamerge.attacks import Precision
from datamerge.encoders import Encoder, Head
from datamerge.runtime.compilers import prepare_compilation
from storage_schemas import ConfigError
from trainer.estimators.base import BATCH_NORMS
from trainer.estimators.gauss_newton import outputs_and_diagonal
from trainer.losses import Likelihood

COMPILED: dict[str, str | int | bool | Callable[..., Any]] = {"fallback_random": True}


class Forward(nn.Module):
    """Pixels [B, C, H, W] → float32 outputs [B, K].

    Args:
        encoder: the encoder to train.
        head: frozen class head after the encoder, run in float32; None if there is none.
        precision: bfloat16 runs all but the first layer of the encoder under autocast (see `pixels_in_float32`).
        compiled: whether to compile the encoder with torch.compile.
    """

    def __init__(
        self, encoder: Encoder, head: Head | None = None, precision: Precision = "float32", compiled: bool = False
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self._bfloat16 = precision == "bfloat16"
        if self._bfloat16:
            pixels_in_float32(encoder)
        # A function, not a submodule, so that state_dict() keeps the encoder's own names.
        self._run = compile_forward(encoder) if compiled else encoder
        self.compiled_diagonal = torch.compile(self._diagonal, options=COMPILED) if compiled else None

    @property
    def width(self) -> int:
        """K, the number of outputs."""
        return self.encoder.embedding_dim if self.head is None else len(self.head.weight)

    def forward(self, pixels: Tensor) -> Tensor:
        return self._through(self._run, pixels)

    def _through(self, run: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self._bfloat16):
            embeddings = run(pixels)
        if not self._bfloat16:
            return embeddings if self.head is None else cast(Tensor, self.head(embeddings))
        with torch.autocast(pixels.device.type, enabled=False):
            return embeddings.float() if self.head is None else cast(Tensor, self.head(embeddings.float()))

    def _diagonal(self, pixels: Tensor, loss: Likelihood, noise: list[Tensor]) -> tuple[Tensor, Tensor]:
        # Autocast covers the backward pass too; otherwise torch.func would mix dtypes there.
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self._bfloat16, cache_enabled=False):
            return outputs_and_diagonal(lambda points: self._through(self.encoder, points), pixels, loss, noise)


class _InFloat32(nn.Module):
    """Mixin for the class of a layer, which then runs in float32 under autocast."""

    def forward(self, values: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            return cast(Tensor, super().forward(values.float()))  # forward() of the layer's own class


def pixels_in_float32(encoder: Encoder) -> None:
    """Run the encoder's first convolution or linear layer in float32 under autocast; idempotent.

    In bfloat16, with 8 significant bits, normalised pixels between 1 and 2 would be rounded to half a grey level,
    while means of ten members differ by tenths of one and deviations along factors by one. The first layer's outputs
    are rounded like all other activations. The layer is 1 to 3 % of the work of a vision transformer.
    """
    layer = first_layer(encoder)
    if layer is not None and not isinstance(layer, _InFloat32):
        kind = type(layer)
        # A new class, not a hook or wrapper: weights keep their names, and deep copies (the average) work.
        layer.__class__ = type(kind.__name__, (_InFloat32, kind), {})


def first_layer(encoder: Encoder) -> nn.Module | None:
    """The first convolution or linear layer that an encoder runs; None if it runs none."""
    met: list[nn.Module] = []
    layers = [module for module in encoder.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_pre_hook(lambda module, _: met.append(module)) for layer in layers]
    try:
        with torch.no_grad(), seeded_layers(0, encoder.mean.device):
            encoder(torch.full((1, *encoder.input_shape), 0.5, device=encoder.mean.device))
    finally:
        for handle in handles:
            handle.remove()
    return met[0] if met else None


def compile_forward(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    """Compile the encoder's forward pass with torch.compile.

    Dropout draws the same numbers as without compilation, so a run may be continued with the other setting.

    Raises:
        ConfigError: this machine has no compiler.
    """
    prepare_compilation("compile", encoder.mean.device.type)
    return cast(Callable[[Tensor], Tensor], torch.compile(encoder.forward, options=COMPILED))


@contextmanager
def seeded_layers(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, from which dropout draws, and restore them at the end of the block."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        # torch.manual_seed() would also seed the generators of other GPUs, which are not restored.
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type != "cpu":
            torch.manual_seed(seed)
        yield


def train_mode(encoder: nn.Module) -> None:
    """Set all layers but BatchNorm to training mode.

    In training mode BatchNorm would make every group's outputs, and so its input gradient, depend on the other
    groups of the batch, and would fail for a single group. Its running statistics would become those of merged
    images, which are smoother than the images that the encoder will be used on.
    """
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, BATCH_NORMS):
            module.eval()


def freeze(encoder: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match a pattern; names are those of `encoder.model`, such as conv1.weight.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    parameters = {name.removeprefix("model."): p for name, p in encoder.named_parameters()}
    for pattern in patterns:
        matching = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matching:
            close = difflib.get_close_matches(pattern, parameters, n=1, cutoff=0) or list(parameters)[:1]
            raise ConfigError(
                f"freeze: expected a pattern that matches parameters of the encoder, such as {close[0]!r}, found "
                f"{pattern!r}; change or drop it"
            )
        for name in matching:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(
            f"freeze: {', '.join(patterns)} match all parameters of the encoder; nothing is left to train"
        )


def check_rows_apart(encoder: Encoder, device: torch.device) -> None:
    """Refuse an encoder whose output for one image depends on the other images of its batch.

    `train_mode` prevents this for BatchNorm; this check finds every other cause by running one image in two different
    batches, with the same dropout.

    Raises:
        ConfigError: the encoder mixes the images of a batch.
    """
    images = torch.linspace(0, 1, 3 * torch.Size(encoder.input_shape).numel(), device=device)
    first, second, third = images.reshape(3, *encoder.input_shape).flip(1)
    outputs = []
    with torch.no_grad():
        for other in (second, third):
            with seeded_layers(0, device):
                outputs.append(encoder(torch.stack([first, other]))[0])
    difference = float((outputs[0] - outputs[1]).abs().max())
    # Kernels add in the same order for equal shapes; the tolerance is a safety margin.
    if difference > 1e-4 * (1e-6 + float(outputs[0].abs().max())):
        raise ConfigError(
            f"encoder: expected each image's embedding to depend on that image alone, found one of {encoder.spec!r} "
            f"that moves by {difference:.3g} with the other images of the batch; normalise per image (LayerNorm, "
            "GroupNorm)"
        )
