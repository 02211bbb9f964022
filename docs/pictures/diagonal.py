"""Draws diagonal.svg of concepts.md: `python docs/pictures/diagonal.py`.

Two pixels, N = 10 members, and the loss L(x) = (w·(x − x̄))² of a linear model, which sees both pixels alike. Its mean
over the members, over the cloud that the variance describes, and over all sketches, each computed from its points.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

MEMBERS, GREY_LEVELS = 10, 2.0
WEIGHTS = np.array([0.5, 0.5])
Points = npt.NDArray[np.float64]


def members() -> Points:
    """Deviations from the mean: both ends of the direction in which the loss is steep, each a little off."""
    ends = np.where(np.arange(MEMBERS) % 2 == 0, GREY_LEVELS, -GREY_LEVELS)
    points = ends[:, None] + np.random.default_rng(3).uniform(-0.5, 0.5, (MEMBERS, 2))
    return np.asarray(points - points.mean(axis=0))


def cloud(deviations: Points) -> Points:
    """√v∘z for all signs z."""
    return np.asarray(np.array(list(product((-1, 1), repeat=2))) * np.sqrt(np.square(deviations).mean(axis=0)))


def sketches(deviations: Points) -> Points:
    """1/√N Σ ξ_i u_i for all signs ξ."""
    signs = np.array(list(product((-1, 1), repeat=MEMBERS)))
    return np.asarray(signs @ deviations / np.sqrt(MEMBERS))


def mean_loss(points: Points) -> float:
    return float(np.square(points @ WEIGHTS).mean())


def draw(path: Path) -> None:
    mpl.rcParams.update({"svg.hashsalt": "diagonal", "svg.fonttype": "none", "font.size": 10})
    figure = Figure(figsize=(9, 4), layout="constrained")
    deviations = members()
    every = sketches(deviations)
    typical = np.sqrt(mean_loss(every))
    one = every[np.argmin(np.abs(every @ WEIGHTS - typical))]
    panels = (
        ("the members", deviations, None),
        ("mean and variance: x̄ ± √v∘z", cloud(deviations), None),
        ("mean and one sketch: x̄ ± F", np.stack([one, -one]), every),
    )
    grid = np.linspace(-6.5, 6.5, 41)
    for axes, (title, points, behind) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        x, y = np.meshgrid(grid, grid)
        axes.contour(x, y, np.square(WEIGHTS[0] * x + WEIGHTS[1] * y), levels=(1, 4, 9, 16, 25), cmap="Blues")
        if behind is not None:
            axes.scatter(*behind[::8].T, s=5, color="0.5", linewidths=0)
        axes.scatter(*points.T, color="tab:red", zorder=3)
        axes.plot(0, 0, "k+", markersize=10)
        scope = "" if behind is None else ", all sketches"
        value = mean_loss(points if behind is None else behind)
        axes.set(title=f"{title}\nmean loss {value:.2f}{scope}", xlabel="pixel 1, grey levels", aspect="equal")
    figure.axes[0].set_ylabel("pixel 2, grey levels")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".svg"))
