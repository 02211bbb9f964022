"""How a photo becomes the pixels that an encoder takes: recorded with every encoder, artifact and run.

Three steps: bring the photo to a scale, cut (or pad) the centre to the input's size, normalise each channel. Moments
are of pixels after the second step; the third is the encoder's first layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from storage_schemas.errors import ConfigError

Resize = Literal["shortest", "longest", "squash", "none"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Rounding = Literal["down", "nearest"]

# What releases before 0.2.0 wrote into manifests; they knew one way of resizing.
_EARLIER = {"bicubic, shorter side": "shortest", "none": "none"}
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
        fill: grey level of the padding, per channel; 0 unless given.
        mean, std: of the normalisation, per channel of pixels in [0, 1]; None where no encoder says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, int, int]
    resize: Resize = "shortest"
    scale: tuple[int, int] = (0, 0)
    interpolation: Interpolation = "bicubic"
    rounding: Rounding = "down"
    fill: tuple[int, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """Scale and fill follow from the shape; what earlier releases wrote is read."""
        if not isinstance(values, Mapping) or "shape" not in values:
            return values
        filled = {key: value for key, value in values.items() if key != "crop"}
        filled["resize"] = _EARLIER.get(filled.get("resize", "shortest"), filled.get("resize", "shortest"))
        channels, *size = filled["shape"]
        return {"scale": tuple(size), "fill": (0,) * channels, **filled}

    @field_validator("mean", "std", "fill")
    @classmethod
    def _one_a_channel(cls, values: tuple[float, ...] | None, info: Any) -> tuple[float, ...] | None:
        channels = info.data.get("shape", (0,))[0]
        if values is not None and len(values) == 1:
            values = values * channels
        if values is not None and (len(values) != channels or not all(map(math.isfinite, values))):
            raise ValueError(f"expected {channels} finite numbers, one a channel, found {list(values)}")
        return values

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the pixels."""
        return self.shape[1:]

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
            first = error.errors()[0]
            name = ".".join(map(str, ("preprocessing", *first["loc"])))
            raise ConfigError(
                f"{where}: expected a preprocessing, found a problem in {name}: {first['msg']}"
            ) from None

    def differences(self, other: Preprocessing) -> list[str]:
        """What differs between two, a phrase each: `resize shortest here, squash there`; empty if they agree.

        What one of them does not say (the normalisation without an encoder, the resizing of images that are taken as
        they are) differs from nothing.
        """
        geometry = ("resize", "scale", "interpolation", "rounding", "fill")
        names = ["shape", *(geometry if "none" not in (self.resize, other.resize) else ()), "mean", "std"]
        # Squashing rounds nothing; only padding has a fill.
        if self.resize == other.resize == "squash":
            names.remove("rounding")
        if self.resize == other.resize != "longest" and "fill" in names:
            names.remove("fill")
        return [
            f"{name} {_text(mine)} here, {_text(theirs)} there"
            for name in names
            if not _same(mine := getattr(self, name), theirs := getattr(other, name))
        ]


def _same(mine: Any, theirs: Any) -> bool:
    if mine is None or theirs is None or mine == theirs:
        return True
    if isinstance(mine, str) or isinstance(theirs, str) or len(mine) != len(theirs):
        return False
    return all(abs(one - two) <= TOLERANCE for one, two in zip(mine, theirs, strict=True))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if all(isinstance(one, int) for one in value):
        return "x".join(map(str, value))
    return f"({', '.join(f'{one:g}' for one in value)})"
