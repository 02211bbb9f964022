"""Encoders: modules that take pixels in [0, 1] and contain their normalisation.

Shapes: B batch, C H W pixels, K embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from datamerge.encoders import hugging_face, open_clip_models, own_models, timm_models
from datamerge.encoders.building import Built, seeded
from datamerge.encoders.checkpoints import as_trained, load_into, read_checkpoint, weights_sha256
from datamerge.encoders.specs import EncoderSpec, parse_spec
from datamerge.runtime.messages import first_line, say, warn
from storage_schemas import ConfigError
from storage_schemas.schema.preprocessing import Preprocessing

# Kind of a spec → builder, which takes the spec and the preprocessing that its file of weights records.
BUILDERS: Mapping[str, Callable[[EncoderSpec, Preprocessing | None], Built]] = {
    "open_clip": open_clip_models.build,
    "timm": timm_models.build,
    "hf": hugging_face.build,
    "mlp": own_models.build_mlp,
    "python": own_models.build_python,
}


class Encoder(nn.Module):
    """A network f_θ: pixels [B, C, H, W] in [0, 1] → embeddings [B, K].

    Attributes:
        model: the network, on normalised pixels.
        spec: the spec it was made from.
        preprocessing: preprocessing of photos to its pixels, and its normalisation.
        embedding_dim: K.
        sha256: SHA-256 of the weights it was loaded with.
        random_weights: whether the weights are untrained.
        code: hash of the user's code that computes it; None if a library does.

    Raises:
        ConfigError: the network fails on pixels of its shape, or does not return embeddings [B, K].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        spec: str,
        preprocessing: Preprocessing,
        random_weights: bool,
        code: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.preprocessing = preprocessing
        self.random_weights = random_weights
        self.code = code
        # None means no normalisation.
        mean, std = preprocessing.mean or (0.0,), preprocessing.std or (1.0,)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.sha256 = weights_sha256(model)
        self.eval()
        self.embedding_dim = self._probe()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the input pixels."""
        return self.preprocessing.shape

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of the weights and, if known, of the user's code, which identify the function it computes."""
        return {"sha256": self.sha256, **({} if self.code is None else {"code_sha256": self.code})}

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings [B, K], not normalised, of pixels [B, C, H, W] in [0, 1]."""
        return cast(Tensor, self.model((pixels - self.mean) / self.std))

    def _probe(self) -> int:
        """Width of the embedding, from a forward pass on a grey image."""
        with torch.no_grad():
            try:
                output = self(torch.full((1, *self.input_shape), 0.5))
            except (RuntimeError, ValueError, TypeError) as error:
                raise ConfigError(
                    f"encoder: expected a network on pixels {self.input_shape}, found that {self.spec!r} fails: "
                    f"{first_line(error)}"
                ) from error
        if not isinstance(output, Tensor) or output.ndim != 2:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ConfigError(f"encoder: expected embeddings [1, K] of {self.spec!r}, found {found}")
        return int(output.shape[1])


def load_encoder(spec: str, device: str = "cpu", aloud: bool = True) -> Encoder:
    """Build the encoder of a spec (see `datamerge.encoders.specs`), in eval mode.

    Args:
        spec: spec of the network and its weights.
        device: device of the encoder.
        aloud: whether to print what was resampled or assumed; workers do not repeat what their driver has printed.

    Raises:
        ConfigError: the model or tag is unknown, or the weights cannot be read or do not fit.
    """
    parsed = parse_spec(spec)
    checkpoint = read_checkpoint(parsed.checkpoint) if parsed.checkpoint else None
    parsed = as_trained(parsed, checkpoint)
    with seeded():
        built = BUILDERS[parsed.kind](parsed, checkpoint.preprocessing if checkpoint else None)
    loaded = [] if checkpoint is None else load_into(built.model, checkpoint, built.spec)
    if aloud:
        for line in [*built.notes, *loaded]:
            say(line)
        for line in built.doubts:
            warn(line)
    untrained = checkpoint is None and not parsed.has_weights
    model = _channels_last(built.model)
    return Encoder(model, str(built.spec), built.preprocessing, untrained, built.code).to(device)


def _channels_last(model: nn.Module) -> nn.Module:
    """Put the weights of convolutions into channels-last memory order, if there are several.

    That makes such networks 10 to 20 % faster (`python -m benchmarks.pgd`: the floor as built over the floor). A
    vision transformer has one convolution only, for its patches.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if len(convolutions) > 1:
        for convolution in convolutions:
            convolution.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's types
    return model
