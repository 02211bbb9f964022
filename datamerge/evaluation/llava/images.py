"""Images for LLaVA: square, at the tower's size, on the 8-bit grid; and adversarial images rounded onto that grid.

Shapes: S pixels a side.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from datamerge.sources import BadImage, decode, native_shape
from datamerge.sources.images import MAX_RESIZED_PIXELS
from storage_schemas import SourceError
from storage_schemas.schema.moments import LEVELS
from storage_schemas.schema.preprocessing import Preprocessing

Fit = Literal["pad", "crop"]
# Largest square around an image: enough for photos of every camera, too small for a strip of 1 × 60,000.
MAX_SQUARE_PIXELS = 2 * MAX_RESIZED_PIXELS


def read_image(path: Path, preprocessing: Preprocessing, fit: Fit) -> npt.NDArray[np.uint8]:
    """Pixels [3, S, S] of a file.

    Args:
        path: the file.
        preprocessing: preprocessing of the vision tower.
        fit: `crop`: as the preprocessing says. `pad`: as LLaVA-1.5 does with any tower: pad to a square with the mean
            colour, then resize with the preprocessing's interpolation.

    Raises:
        SourceError: the file is no image, or the image is too large or too narrow.
    """
    try:
        data = path.read_bytes()
        if fit == "crop":
            return decode(data, preprocessing)
        _, height, width = native_shape(data)
        side = max(height, width)
        if side * side > MAX_SQUARE_PIXELS:
            raise BadImage(f"{width}x{height} pixels: too narrow to pad to a square")
        image = decode(data, Preprocessing(shape=(3, height, width), resize="none"))
    except (BadImage, OSError) as error:
        raise SourceError(f"{path}: expected an image: {error}") from None
    square = np.empty((3, side, side), np.uint8)
    # The reference implementation truncates, too.
    square[:] = np.array([int(value * LEVELS) for value in preprocessing.mean or (0.0,)], np.uint8)[:, None, None]
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = image
    resampling = Image.Resampling[preprocessing.interpolation.upper()]
    resized = Image.fromarray(square.transpose(1, 2, 0)).resize(preprocessing.size[::-1], resampling)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def decisive(preprocessing: Preprocessing, fit: Fit) -> Preprocessing:
    """The preprocessing without the steps that `read_image` replaces when it pads."""
    if fit == "crop":
        return preprocessing
    return Preprocessing(**preprocessing.model_dump(include={"shape", "interpolation", "mean", "std"}))


def round_inside(adversarial: Tensor, clean: Tensor, epsilon: Fraction) -> Tensor:
    """The nearest 8-bit image inside the ℓ∞ ball, uint8, of pixels in [0, 1]; `clean` is on the grid."""
    centre = (clean * LEVELS).round()
    radius = math.floor(epsilon * LEVELS)
    return (adversarial * LEVELS).round().clamp(centre - radius, centre + radius).clamp(0, LEVELS).to(torch.uint8)
