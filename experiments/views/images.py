"""Views of images (augmentations and near-duplicates), written as a Parquet file with the image of each view."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from datamerge.sources import decode, native_shape, open_source
from storage_schemas.schema.preprocessing import Preprocessing

Pixels = NDArray[np.uint8]  # one image, [H, W] or [H, W, 3]
SHIFT, ROTATION = 2, 15.0  # pixels, degrees
NOISE, QUALITY = 8, (30, 95)  # grey levels, range of JPEG quality


class Images(NamedTuple):
    """Decoded images.

    Attributes:
        pixels: uint8 [n, C, H, W].
        labels: [n].
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def read(source: Path, first: int, count: int) -> Images:
    """Decode `count` images of a source, from a position of its listing on."""
    listed = open_source(str(source))
    samples = listed.samples[first : first + count]
    shape = native_shape(listed.reader.read(samples[0]))
    pixels = np.stack([decode(listed.reader.read(sample), Preprocessing(shape=shape)) for sample in samples])
    return Images(pixels, np.array([sample.label for sample in samples]))


def augmented(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Rotate by up to `ROTATION` and shift by up to `SHIFT`; digits are padded with black, photos by reflection."""
    margin = 2 * SHIFT + 4  # what a turn brings in lies outside the crop
    sides = [(margin, margin)] * 2 + [(0, 0)] * (image.ndim - 2)
    padded = np.pad(image, sides, mode="edge" if image.ndim == 2 else "reflect")
    turned = Image.fromarray(padded).rotate(rng.uniform(-ROTATION, ROTATION), Image.Resampling.BILINEAR)
    top, left = margin + rng.integers(-SHIFT, SHIFT + 1, 2)
    height, width = image.shape[:2]
    return np.asarray(turned)[top : top + height, left : left + width]


def near_duplicate(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Compress as JPEG of random quality, then add uniform noise of up to `NOISE` grey levels."""
    noisy = np.clip(image + rng.integers(-NOISE, NOISE + 1, image.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=int(rng.integers(QUALITY[0], QUALITY[1] + 1)))
    return np.asarray(Image.open(file))


KINDS: dict[str, Callable[[Pixels, np.random.Generator], Pixels]] = {
    "augmentations": augmented,
    "near-duplicates": near_duplicate,
}


def views(images: Images, kind: str, count: int, seed: int) -> NDArray[np.uint8]:
    """Random views of each image, [n, count, C, H, W]."""
    rng = np.random.default_rng(seed)
    grey = images.pixels.shape[1] == 1
    found = np.empty((len(images.pixels), count, *images.pixels.shape[1:]), np.uint8)
    for number, pixels in enumerate(images.pixels):
        image = pixels[0] if grey else np.ascontiguousarray(pixels.transpose(1, 2, 0))
        for view in range(count):
            made = KINDS[kind](image, rng)
            found[number, view] = made if grey else made.transpose(2, 0, 1)
    return found


def write_views(found: NDArray[np.uint8], labels: NDArray[np.int64], target: Path) -> None:
    """Write views [n, count, C, H, W] as rows of `image` (PNG), `label` and `group` (number of the source image)."""
    rows = []
    for number, (of_image, label) in enumerate(zip(found, labels, strict=True)):
        for view in of_image:
            file = io.BytesIO()
            Image.fromarray(view.transpose(1, 2, 0).squeeze()).save(file, "PNG", compress_level=1)
            rows.append(
                {"image": {"bytes": file.getvalue(), "path": None}, "label": int(label), "group": f"{number:05d}"}
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), target)
