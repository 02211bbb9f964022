"""How a photo becomes the input pixels of an encoder: recorded with every encoder, artifact and run.

Three steps: resize the photo to a scale, crop (or pad) its centre to the input size, normalise each channel. Moments
are those of the pixels after the second step; the third is the encoder's first layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from storage_schemas.errors import ConfigError, shortened
from storage_schemas.schema.problems import in_words

Resize = Literal["shortest", "longest", "squash", "none"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Rounding = Literal["down", "nearest"]
Alpha = Literal["drop", "white"]
Channels = Annotated[int, Field(ge=1, le=65_536)]
Side = Annotated[int, Field(ge=1)]

# Releases before 0.2.0 wrote this into manifests; they had one way of resizing.
_EARLIER = {"bicubic, shorter side": "shortest"}
_SIDES = {"shortest": "shorter side to ", "longest": "longer side to ", "squash": "squashed to "}
# Means and standard deviations may have been rounded to float32 or to decimals.
TOLERANCE = 1e-6


class Preprocessing(BaseModel):
    """The steps from a photo to normalised pixels.

    Attributes:
        shape: (C, H, W) of the pixels; C is 1 (grey) or 3 (RGB).
        resize: `shortest` fits the shorter side to `scale` and keeps the proportions, `longest` the longer side,
            `squash` resizes both; `none`: images must have the shape already.
        scale: (H, W) of the resized image, before its centre is cropped or padded to `shape`; by default H and W of
            `shape`.
        interpolation: Pillow's filter of that name, antialiased.
        rounding: of the length of the other side: `down` as torchvision's Resize, `nearest` as timm's
            ResizeKeepRatio.
        offset: rounding of the crop's offset: `nearest` pixel, halves to the even one, as torchvision's CenterCrop;
            `down` as transformers.
        fill: grey level (0 to 255) of the padding, per channel; by default 0.
        alpha: `drop` keeps the colours of transparent pixels, as open_clip and timm; `white` composites the image
            onto white, as transformers.
        mean, std: of the normalisation, per channel, for pixels in [0, 1]; None if no encoder defines them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[Channels, Side, Side]
    resize: Resize = "shortest"
    scale: tuple[Side, Side] = (1, 1)
    interpolation: Interpolation = "bicubic"
    rounding: Rounding = "down"
    offset: Rounding = "nearest"
    fill: tuple[Annotated[int, Field(ge=0, le=255)], ...] = ()
    alpha: Alpha = "drop"
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """Derive scale and fill from the shape, and translate records of earlier releases."""
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        if filled.get("crop") == "centre":
            del filled["crop"]
        if isinstance(resize := filled.get("resize"), str):
            filled["resize"] = _EARLIER.get(resize, resize)
        if isinstance(shape := filled.get("shape"), (list, tuple)):
            filled.setdefault("scale", tuple(shape[1:]))
        filled.setdefault("fill", (0,))
        return filled

    @field_validator("mean", "std", "fill")
    @classmethod
    def _one_a_channel(cls, values: tuple[float, ...] | None, info: Any) -> tuple[float, ...] | None:
        channels = info.data.get("shape", (0,))[0]
        if values is not None and len(values) == 1:
            values = values * channels
        if values is not None and (len(values) != channels or not all(map(math.isfinite, values))):
            raise ValueError(f"expected {channels} finite numbers, one a channel, found {shortened(list(values))}")
        return values

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the pixels."""
        return self.shape[1:]

    def of_exact_size(self) -> Preprocessing:
        """The same preprocessing for images that have the shape already and are not resized."""
        return Preprocessing(shape=self.shape, resize="none", alpha=self.alpha, mean=self.mean, std=self.std)

    def record(self) -> dict[str, Any]:
        """The JSON object that a manifest, a run or a checkpoint stores."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def read(cls, record: Any, where: str) -> Self:
        """Parse the JSON object of a manifest, a run or a checkpoint.

        Args:
            record: see `record`.
            where: the document, for messages.

        Raises:
            ConfigError: it is no preprocessing; the message names the document and the first problem.
        """
        try:
            return cls.model_validate(record)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(map(str, ("preprocessing", *first["loc"])))
            raise ConfigError(
                f"{where}: expected a preprocessing, found a problem in {name}: {in_words(first)}"
            ) from None

    @classmethod
    def of_artifact(cls, provenance: Mapping[str, Any], where: str) -> Self | None:
        """The preprocessing in an artifact's provenance; None if it is missing, or partial in a combined artifact.

        Raises:
            ConfigError: this release cannot read it.
        """
        record = provenance.get("preprocessing")
        if not isinstance(record, Mapping) or not {"shape", "resize"} <= record.keys():
            return None
        return cls.read(record, where)

    @property
    def geometry(self) -> Preprocessing:
        """The same without the normalisation: the steps that determine the 8-bit pixels."""
        return self.model_copy(update={"mean": None, "std": None})

    @property
    def is_complete(self) -> bool:
        """Whether the normalisation is defined."""
        return self.mean is not None and self.std is not None

    def differences(self, other: Preprocessing, *, normalised: bool = True) -> list[str]:
        """How this preprocessing differs from the expected one, one phrase per field: `resize shortest, not squash`.

        A field that one of them leaves undefined (the normalisation without an encoder, the resizing of images that
        are used as they are) is not compared, nor is one that affects no pixel (the rounding where `resize` is
        `squash`).

        Args:
            other: the expected preprocessing.
            normalised: also compare means and standard deviations.
        """
        names = ["shape", *self._decisive(other), *(("mean", "std") if normalised else ())]
        return [
            f"{name} {_text(name, mine)}, not {_text(name, theirs)}"
            for name in names
            if not _same(mine := getattr(self, name), theirs := getattr(other, name))
        ]

    def _decisive(self, other: Preprocessing) -> list[str]:
        """Fields of the geometry that affect the pixels of both; a field that affects one alone is not compared."""
        both = (self, other)
        if any(one.resize == "none" for one in both):
            return ["alpha"]
        proportional = all(one.resize != "squash" for one in both)
        padded = all(
            one.resize == "longest" or any(scaled < side for scaled, side in zip(one.scale, one.size, strict=True))
            for one in both
        )
        cropped = all(one.resize != "squash" or one.scale != one.size for one in both)
        return [
            *("resize", "scale", "interpolation"),
            *(("rounding",) if proportional else ()),
            *(("offset",) if cropped else ()),
            *(("fill",) if padded else ()),
            "alpha",
        ]

    def words(self, *names: str) -> dict[str, str]:
        """Readable values of these fields, by name."""
        return {name: _text(name, getattr(self, name)) for name in names}

    def __str__(self) -> str:
        """One line: `3x224x224: shorter side to 256, bicubic, centre cropped, mean (0.485, 0.456, 0.406), …`."""
        if self.resize == "none":
            facts = ["images of this size as they are"]
        else:
            height, width = self.scale
            to = str(height) if height == width and self.resize != "squash" else _text("scale", self.scale)
            facts = [f"{_SIDES[self.resize]}{to}", self.interpolation]
            if self.resize == "longest":
                facts.append(f"the rest filled with {_text('fill', self.fill)}")
            elif self.resize == "shortest" or self.scale != self.size:
                facts.append("centre cropped")
        facts += ["transparent pixels on white"] if self.alpha == "white" else []
        facts += [f"{name} {_text(name, value)}" for name in ("mean", "std") if (value := getattr(self, name))]
        return f"{_text('shape', self.shape)}: {', '.join(facts)}"


def _same(mine: Any, theirs: Any) -> bool:
    if mine is None or theirs is None or mine == theirs:
        return True
    if isinstance(mine, str) or isinstance(theirs, str) or len(mine) != len(theirs):
        return False
    return all(abs(one - two) <= TOLERANCE for one, two in zip(mine, theirs, strict=True))


def _text(name: str, value: Any) -> str:
    """The readable value of a field."""
    if isinstance(value, str):
        return value
    if name in ("shape", "scale"):
        return "x".join(map(str, value))
    if len(set(value)) == 1:
        return f"{value[0]:g}"
    return f"({', '.join(f'{one:g}' for one in value)})"
