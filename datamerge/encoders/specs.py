"""Encoder specs: one string that names a network and its weights.

    open_clip:MODEL/TAG            open_clip:ViT-L-14/openai       weights open_clip knows by that tag
    open_clip:hf-hub:ORG/NAME      open_clip:hf-hub:chs20/fare2-clip
    open_clip:local-dir:FOLDER     a folder with open_clip_config.json and weights
    timm:MODEL/TAG                 timm:resnet50/a1_in1k           weights timm knows by that tag (or MODEL.TAG)
    timm:hf-hub:ORG/NAME           (also timm:local-dir:FOLDER)
    hf:FOLDER, hf:ORG/NAME         hf:openai/clip-vit-base-patch32 a vision model of Hugging Face transformers
    mlp:CxHxW-HIDDEN-…-OUT         mlp:1x28x28-512-512-10          a ReLU network on flattened pixels
    python:MODULE:FACTORY          python:my_models:encoder        a user's function that returns a module

After any of them, `@FILE` takes the weights from a file: `open_clip:ViT-L-14/openai@tuned.pt` is that network, with
the preprocessing and the text tower of that tag. `@REVISION` after a name on the hub selects a revision.
`,image_size=336` before `@FILE` sets the side of the input in pixels.

A spec without weights means random weights, the same on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from storage_schemas import ConfigError
from storage_schemas.access.local_paths import user_path

KINDS = ("open_clip", "timm", "hf", "mlp", "python")
EXAMPLES = (
    "open_clip:ViT-B-32/openai, timm:resnet50@weights.pt, hf:openai/clip-vit-base-patch32, mlp:1x28x28-512-10 or "
    "python:module:factory"
)
HUB, LOCAL = "hf-hub:", "local-dir:"
# Suffixes that distinguish a file of weights from a revision on a hub.
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".index.json")
DCP_TO_FILE = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
# In pixels. A spec may come from a foreign artifact, where a few characters could exhaust the memory.
MAX_SIDE = 4096


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A parsed spec.

    Attributes:
        kind: one of `KINDS`.
        model: architecture, or location of a whole model: `hf-hub:ORG/NAME`, `local-dir:/FOLDER`, for hf a folder or
            ORG/NAME.
        pretrained: the library's tag of the weights; it also determines preprocessing and text tower.
        revision: revision on the hub.
        image_size: side of the input in pixels; None for the model's default.
        checkpoint: absolute path of a file of weights, which replace those of the tag.
    """

    kind: str
    model: str
    pretrained: str | None = None
    revision: str | None = None
    image_size: int | None = None
    checkpoint: str | None = None

    def __str__(self) -> str:
        tag = f"/{self.pretrained}" if self.pretrained else ""
        revision = f"@{self.revision}" if self.revision else ""
        size = f",image_size={self.image_size}" if self.image_size else ""
        checkpoint = f"@{self.checkpoint}" if self.checkpoint else ""
        return f"{self.kind}:{self.model}{tag}{revision}{size}{checkpoint}"

    @property
    def whole(self) -> bool:
        """Whether the model alone determines the weights: on a hub, in a folder, or from a function."""
        return self.kind in ("hf", "python") or self.model.startswith((HUB, LOCAL))

    @property
    def has_weights(self) -> bool:
        """Whether model and tag determine weights, which a file may replace."""
        return self.whole or self.pretrained is not None

    @property
    def named(self) -> str:
        """Kind and model: the network without its weights."""
        return f"{self.kind}:{self.model}"


def parse_spec(text: str) -> EncoderSpec:
    """Parse an encoder spec.

    Raises:
        ConfigError: the text has none of the forms above, or its file does not exist.
    """
    spec = split_spec(text)
    file = None if spec.checkpoint is None else Path(spec.checkpoint)
    if file is not None and not file.is_file():
        found = "a folder; name the file in it" if file.is_dir() else "none"
        if (file / ".metadata").is_file():
            found = f"a folder of torch.distributed.checkpoint; make a file of it by `{DCP_TO_FILE}`"
        raise ConfigError(f"encoder: expected a weights file at {spec.checkpoint!r} for {text!r}, found {found}")
    return spec


def split_spec(text: str) -> EncoderSpec:
    """Parse an encoder spec without checking that its file exists.

    Raises:
        ConfigError: the text has none of the forms above.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS or not rest:
        raise ConfigError(f"encoder: expected one of {EXAMPLES}, found {text!r}")
    name, file = _split_file(kind, rest)
    # Absolute, because manifests and runs record specs, and are read from other folders.
    checkpoint = None if file is None else str(user_path(file).absolute())
    name, size = _split_size(name)
    if size is not None and not (re.fullmatch(r"[0-9]{1,5}", size) and 1 <= int(size) <= MAX_SIDE):
        raise ConfigError(f"encoder: expected an image_size of 1 to {MAX_SIDE} pixels, found {size!r} in {text!r}")
    image_size = None if size is None else int(size)
    if kind == "hf" or name.startswith((HUB, LOCAL)):
        model, revision = _split_revision(name)
        spec = EncoderSpec(kind, model, None, revision, image_size, checkpoint)
    elif kind in ("open_clip", "timm"):
        # timm writes resnet50.a1_in1k; none of its models has a dot in its name.
        model, _, tag = name.replace(".", "/", 1).partition("/") if kind == "timm" else name.partition("/")
        spec = EncoderSpec(kind, model, tag if tag not in ("", "random") else None, None, image_size, checkpoint)
    else:
        spec = EncoderSpec(kind, name, None, None, image_size, checkpoint)
    if not spec.model or spec.model in (HUB, LOCAL):
        raise ConfigError(f"encoder: the model's name is missing in {text!r}; expected e.g. {EXAMPLES}")
    return spec


def _split_file(kind: str, rest: str) -> tuple[str, str | None]:
    """The part before `@FILE`, and FILE. Folders and revisions may contain an @ too."""
    if kind != "hf" and not rest.startswith((HUB, LOCAL)):
        name, at, file = rest.partition("@")
        return name, file if at else None
    if Path(_split_size(rest)[0].removeprefix(LOCAL)).expanduser().is_dir():
        return rest, None
    cuts = [(rest[: at.start()], rest[at.end() :]) for at in re.finditer("@", rest)]
    files = [(name, file) for name, file in cuts if file.endswith(SUFFIXES)]
    there = [(name, file) for name, file in cuts if user_path(file).is_file()]
    # Recorded paths are absolute, so they can be recognised even if the file is missing.
    recorded = [(name, file) for name, file in files if file.startswith("/")]
    return next(iter(there or recorded or files[::-1]), (rest, None))


def _split_size(name: str) -> tuple[str, str | None]:
    found = re.fullmatch(r"(.*),image_size=([^/@]*)", name, re.DOTALL)
    return (found[1], found[2]) if found else (name, None)


def _split_revision(name: str) -> tuple[str, str | None]:
    """A folder as an absolute path, or a name on a hub and its revision."""
    schema = next((schema for schema in (HUB, LOCAL) if name.startswith(schema)), "")
    place = name.removeprefix(schema)
    folder = user_path(place)
    if schema == LOCAL or (not schema and (folder.is_dir() or place.startswith(("/", ".", "~")))):
        return f"{schema}{folder.absolute()}" if place else name, None
    place, _, revision = place.partition("@")
    if not schema and Path(place).is_dir():
        raise ConfigError(
            f"encoder: expected a name on the hub before @{revision}, found the folder {place}; drop the revision"
        )
    return f"{schema}{place}", revision or None


@contextmanager
def refusals_about(setting: str) -> Iterator[None]:
    """Inside, errors about an encoder's spec name `setting` instead of `encoder`.

    Raises:
        ConfigError: the error of the block, about `setting`.
    """
    try:
        yield
    except ConfigError as error:
        if error.field != "encoder":
            raise
        raise ConfigError(f"{setting}: {str(error).removeprefix('encoder: ')}") from error


def with_checkpoint(spec: str, path: str) -> str:
    """The spec with its weights from the file `path`."""
    return str(replace(split_spec(spec), checkpoint=path))


def with_image_size(spec: str, image_size: int | None) -> str:
    """The spec with an input of `image_size` pixels a side; unchanged for None."""
    return spec if image_size is None else str(replace(parse_spec(spec), image_size=image_size))


def at_home(spec: str, folder: Path) -> str:
    """The spec of a run's encoder with its weights from the folder of the run, if the file exists there.

    Runs get moved and copied, so the recorded path may by now belong to another run.
    """
    checkpoint = split_spec(spec).checkpoint
    own = folder / Path(checkpoint).name if checkpoint else None
    return with_checkpoint(spec, str(own.absolute())) if own is not None and own.is_file() else spec
