"""Encoder specs: one string that says which network and which weights.

    open_clip:MODEL/PRETRAINED     open_clip:ViT-L-14/openai       weights open_clip knows by that tag
    open_clip:MODEL@CHECKPOINT     open_clip:ViT-B-32@tuned.safetensors
    timm:MODEL/PRETRAINED          timm:resnet50/a1_in1k           weights timm knows by that tag
    timm:MODEL@CHECKPOINT
    mlp:CxHxW-HIDDEN-…-OUT         mlp:1x28x28-512-512-10          a ReLU network on flattened pixels
    python:MODULE:FACTORY          python:my_models:encoder        your own function that returns a module

Any spec without PRETRAINED or CHECKPOINT has random weights, the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from storage_schemas import ConfigError

KINDS = ("open_clip", "timm", "mlp", "python")
EXAMPLES = "open_clip:ViT-B-32/openai, timm:resnet50@weights.pt, mlp:1x28x28-512-10 or python:module:factory"


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A parsed spec; `pretrained` and `checkpoint` exclude each other."""

    kind: str
    model: str
    pretrained: str | None
    checkpoint: str | None

    def __str__(self) -> str:
        tag = f"/{self.pretrained}" if self.pretrained else ""
        checkpoint = f"@{self.checkpoint}" if self.checkpoint else ""
        return f"{self.kind}:{self.model}{tag}{checkpoint}"


def parse_spec(text: str) -> EncoderSpec:
    """Parse an encoder spec.

    Raises:
        ConfigError: not of one of the forms above, or a checkpoint that does not exist.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS or not rest:
        raise ConfigError(f"encoder: expected one of {EXAMPLES}, found {text!r}")
    model, at, checkpoint = rest.partition("@")
    pretrained = None
    if kind in ("open_clip", "timm"):
        model, _, tag = model.partition("/")
        pretrained = tag if tag not in ("", "random") else None
    if at and not Path(checkpoint).expanduser().is_file():
        raise ConfigError(f"encoder: expected a weights file at {checkpoint!r} for {text!r}, found none")
    if at and pretrained:
        raise ConfigError(f"encoder: give either /{pretrained} or @{checkpoint}, not both, found {text!r}")
    if not model:
        raise ConfigError(f"encoder: the model's name is missing in {text!r}; expected e.g. {EXAMPLES}")
    # Absolute, because specs are recorded in manifests and runs and read back from other folders.
    absolute = str(Path(checkpoint).expanduser().absolute()) if at else None
    return EncoderSpec(kind, model, pretrained, absolute)


@contextmanager
def refusals_about(setting: str) -> Iterator[None]:
    """Name this setting instead of `encoder` where the spec of another one is refused inside.

    Raises:
        ConfigError: as the block, with the setting in front.
    """
    try:
        yield
    except ConfigError as error:
        if error.field != "encoder":
            raise
        raise ConfigError(f"{setting}: {str(error).removeprefix('encoder: ')}") from error


def with_checkpoint(spec: str, path: str) -> str:
    """The same network with its weights from `path`."""
    kind, _, rest = spec.partition(":")
    model = rest.partition("@")[0]
    if kind in ("open_clip", "timm"):
        model = model.partition("/")[0]
    return f"{kind}:{model}@{path}"


def at_home(spec: str, folder: Path) -> str:
    """The spec of a run's encoder with its weights from the run's own folder, where they are there.

    Runs get moved and copied, and the path to where one was may lead to another by now.
    """
    _, at, checkpoint = spec.partition("@")
    own = folder / Path(checkpoint).name
    return with_checkpoint(spec, str(own.absolute())) if at and own.is_file() else spec
