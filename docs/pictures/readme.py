"""The README's picture: a real group, and what is done once and what many times.

    DATAMERGE_DATA=FOLDER python -m docs.pictures.draw readme

Four attacks of a photo of the NIPS-2017 set at 8/255, so that the eye sees them, on an encoder with ImageNet weights.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no display needed

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from experiments.photos.prepare import SPEC, convert, part
from merge_service import MergeConfig, merge
from storage_schemas import Record, open_artifact
from storage_schemas.schema.pixel_length import PixelLength

PHOTO, AMPLIFIED = 104, 8
BLUE, GREY = "#3f51b5", "#616161"


def group(folder: Path) -> Record:
    """The merged attacks of one photo."""
    weights, head = folder / "encoder.safetensors", folder / "head.safetensors"
    convert(weights, head)
    photos = part(Path(os.environ["DATAMERGE_DATA"]) / "nips17", folder / "photo", PHOTO, 1)
    merge(
        MergeConfig(
            source=photos,
            artifact=str(folder / "artifact"),
            encoder=f"{SPEC}@{weights}",
            epsilon=PixelLength("8/255"),
            step_size=PixelLength("2/255"),
            members=4,
            keep_members=True,
            keep_clean=True,
        )
    )
    return open_artifact(folder / "artifact")[0]


def sheet(record: Record, axes: list[Axes]) -> None:
    """Clean image, a member, its difference, mean and variance."""
    clean, members = (record.arrays[name].astype(float) / 255 for name in ("clean", "members"))
    deviation = np.sqrt(record.variance)
    tiles = {
        "clean image": clean,
        "1 of 4 attacks": members[0],
        f"their difference × {AMPLIFIED}": 0.5 + AMPLIFIED * (members[0] - clean),
        "mean of the 4": record.mean,
        "variance": deviation / deviation.max(),
    }
    for axis, (title, pixels) in zip(axes, tiles.items(), strict=True):
        axis.imshow(np.clip(pixels.transpose(1, 2, 0), 0, 1))
        axis.set_title(title, fontsize=9, color=GREY)
        axis.axis("off")


def flow(axis: Axes) -> None:
    """Attack once, store, train many times."""
    axis.set(xlim=(0, 10), ylim=(0, 3))
    axis.axis("off")
    boxes = [
        (0.1, "merge", "once, offline: embed the\nclean images, attack them\nif many runs will share it"),
        (3.6, "artifact", "Zarr or WebDataset shards,\nhashed, resumable,\nlocal or s3://, https://"),
        (7.1, "train, train, train", "streams it, takes a step\nof attack on the encoder\nas it is; opens no image"),
    ]
    for left, title, text in boxes:
        axis.add_patch(
            FancyBboxPatch((left, 0.3), 2.8, 2.3, boxstyle="round,pad=0.05", facecolor="white", edgecolor=BLUE)
        )
        axis.text(left + 1.4, 2.25, title, ha="center", va="center", fontsize=11, weight="bold", color=BLUE)
        axis.text(left + 1.4, 1.15, text, ha="center", va="center", fontsize=9, color="black", linespacing=1.4)
    for left in (2.95, 6.45):
        axis.add_patch(
            FancyArrowPatch((left, 1.45), (left + 0.6, 1.45), arrowstyle="-|>", mutation_scale=14, color=BLUE)
        )


def main() -> None:
    figure = plt.figure(figsize=(9, 3.9), layout="constrained")
    grid = figure.add_gridspec(2, 5, height_ratios=[1.05, 1])
    with tempfile.TemporaryDirectory() as folder:
        sheet(group(Path(folder)), [figure.add_subplot(grid[0, column]) for column in range(5)])
    flow(figure.add_subplot(grid[1, :]))
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
