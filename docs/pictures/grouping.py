"""Draws grouping.png of how-to/grouping.md: groups of MNIST digits.

Above six samples of a class as they come (`label`), their mean and variance; below mean and variance of the k-means
clusters inside that class (`cluster`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import datamerge as dm
from docs.pictures.session import datamerge, digits

DIGIT, MEMBERS, CLUSTERS = 2, 6, 8


def records(folder: Path, settings: str) -> list[Any]:
    """The groups of the digit."""
    name = settings.split()[0]
    datamerge(f"merge digits.npz {name} --grouping {settings} --max-workers 1", folder)
    return [record for record in dm.open_artifact(str(folder / name)) if record.label == DIGIT]


def show(axes: Axes, image: Any, title: str, colours: str = "gray") -> None:
    axes.imshow(np.asarray(image)[0], cmap=colours)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def draw(path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        digits(Path(name) / "digits.npz", 60)
        run = records(Path(name), f"label --members {MEMBERS} --keep-members")[0]
        clusters = records(Path(name), f"cluster --clusters {CLUSTERS}")
    figure = Figure(figsize=(9, 4), layout="constrained")
    above, means, variances = figure.subplots(3, CLUSTERS)
    for number, (axes, member) in enumerate(zip(above, run.members, strict=False)):
        show(axes, member, f"member {number}")
    show(above[-2], run.mean, "mean")
    show(above[-1], run.variance, "variance", "inferno")
    for cluster, mean, variance in zip(clusters, means, variances, strict=True):
        show(mean, cluster.mean, f"mean, N = {cluster.count}")
        show(variance, cluster.variance, "variance", "inferno")
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(__file__).resolve().with_suffix(".png"))
