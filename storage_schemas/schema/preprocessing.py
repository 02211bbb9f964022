"""How a photo becomes the pixels that an encoder takes: recorded with every encoder, artifact and run.

Three steps: bring the photo to a scale, cut (or pad) the centre to the input's size, normalise each channel. Moments
are of pixels after the second step; the third is the encoder's first layer.
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

# What releases before 0.2.0 wrote into manifests; they knew one way of resizing.
_EARLIER = {"bicubic, shorter side": "shortest"}
_SIDES = {"shortest": "shorter side to ", "longest": "longer side to ", "squash": "squashed to "}
# Means travel through float32 and decimals.
TOLERANCE = 1e-6


class Preprocessing(BaseModel):
    """From a photo to normalised pixels.

    Attributes:
        shape: (C, H, W) of the pixels; C is 1 (grey) or 3 (RGB).
        resize: `shortest` fits the shorter side to `scale` and keeps the proportions, `longest` the longer side,
            `squash` resizes both; `none`: images must have the shape already.
        scale: (H, W) that images are resized to, before the centre of the shape is cropped or padded; H and W of the
            shape unless given.
        interpolation: Pillow's filter of that name, antialiased.
        rounding: of the other side's length: `down` as torchvision's Resize, `nearest` as timm's ResizeKeepRatio.
        offset: of the crop: `nearest` pixel, halves to the even one, as torchvision's CenterCrop; `down` as
            transformers.
        fill: grey level of the padding, per channel; 0 unless given.
        alpha: `drop` takes the colours of transparent pixels as they are, as open_clip and timm; `white` puts the
            image on white, as transformers.
        mean, std: of the normalisation, per channel of pixels in [0, 1]; None where no encoder says.
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
        """Scale and fill follow from the shape; what earlier releases wrote is read."""
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
        """The same pixels of images that have the shape already, which are not resized."""
        return Preprocessing(shape=self.shape, resize="none", alpha=self.alpha, mean=self.mean, std=self.std)

    def record(self) -> dict[str, Any]:
        """As JSON: what a manifest, a run and a checkpoint say of it."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def read(cls, record: Any, where: str) -> Self:
        """From what a manifest, a run or a checkpoint says.

        Raises:
            ConfigError: no such record; names where it stands.
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
        """What the provenance of an artifact says; None where it does not, or only in part after a combination.

        Raises:
            ConfigError: something that this release cannot read.
        """
        record = provenance.get("preprocessing")
        if not isinstance(record, Mapping) or not {"shape", "resize"} <= record.keys():
            return None
        return cls.read(record, where)

    @property
    def geometry(self) -> Preprocessing:
        """The same without the normalisation: what the 8-bit pixels depend on."""
        return self.model_copy(update={"mean": None, "std": None})

    @property
    def is_complete(self) -> bool:
        """Whether it says how pixels are normalised, too."""
        return self.mean is not None and self.std is not None

    def differences(self, other: Preprocessing, *, normalised: bool = True) -> list[str]:
        """In what this is another one than expected, a phrase each: `resize shortest, not squash`.

        What one of them does not say (the normalisation without an encoder, the resizing of images that are taken as
        they are) differs from nothing, and neither does what changes no pixel (the rounding of what is squashed).

        Args:
            other: what was expected.
            normalised: also compare means and standard deviations.
        """
        names = ["shape", *self._decisive(other), *(("mean", "std") if normalised else ())]
        return [
            f"{name} {_text(name, mine)}, not {_text(name, theirs)}"
            for name in names
            if not _same(mine := getattr(self, name), theirs := getattr(other, name))
        ]

    def _decisive(self, other: Preprocessing) -> list[str]:
        """Fields of the geometry on which the pixels of both depend; where those of one alone do, others differ."""
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
        """Fields as a person writes them, by name."""
        return {name: _text(name, getattr(self, name)) for name in names}

    def __str__(self) -> str:
        """In one line: `3x224x224: shorter side to 256, bicubic, centre cropped, mean (0.485, 0.456, 0.406), …`."""
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
    """The value of a field, as a person writes it."""
    if isinstance(value, str):
        return value
    if name in ("shape", "scale"):
        return "x".join(map(str, value))
    if len(set(value)) == 1:
        return f"{value[0]:g}"
    return f"({', '.join(f'{one:g}' for one in value)})"
