"""Curves as SVG that takes the colours of the page around it, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Distinct for colour-blind eyes, and visible on white as on black.
COLOURS = ("#3b82c4", "#e07b39", "#2fa37c", "#c75d9b", "#9a8c2c", "#8f7fd6", "#c94f4f", "#7a8794")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Stands for the colour of the page's text until matplotlib has drawn.
INK = "#010203"
WIDTH, HEIGHT = 5.0, 3.5  # inches, at 72 units an inch
WITHOUT_MATPLOTLIB = "The curves are left out: matplotlib is not installed (pip install matplotlib)."


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: in the legend.
        x, y: points.
        low, high: their intervals, empty where none are known.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def draw(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Mapping[float, str] | None = None,
    logarithmic: bool = False,
) -> str | None:
    """An `<svg>` element with the curves; the same curves give the same text. None where matplotlib is missing.

    Args:
        series: the curves.
        x_label, y_label: of the axes, with the unit. No y is negative.
        x_ticks: position → text; matplotlib's own if None. Intervals of several curves at one position are drawn
            side by side.
        logarithmic: whether the y axis is.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure  # not pyplot: it may want a display, and its state is the user's
    except ModuleNotFoundError:
        return None
    style: dict[Any, Any] = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
        **{"svg.fonttype": "none", "svg.hashsalt": "datamerge", "font.size": 10, "axes.grid": True},
        **{"grid.color": INK, "grid.alpha": 0.12, "axes.spines.top": False, "axes.spines.right": False},
        **{"legend.frameon": False, "lines.linewidth": 1.6, "lines.markersize": 5},
    }
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(style)
        figure = Figure(figsize=(WIDTH, HEIGHT + 0.2 * (len(series) // 3)), layout="constrained")
        axes = figure.add_subplot()
        span = max((x for one in series for x in one.x), default=1) or 1
        for place, one in enumerate(series):
            look: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "label": one.name}
            if x_ticks is None:
                axes.plot(one.x, one.y, **look)
                continue
            shift = 0.012 * span * (place - (len(series) - 1) / 2)
            error = [
                [max(0.0, y - low) for y, low in zip(one.y, one.low, strict=True)],
                [max(0.0, high - y) for y, high in zip(one.y, one.high, strict=True)],
            ]
            marker = MARKERS[place % len(MARKERS)]
            axes.errorbar([x + shift for x in one.x], one.y, yerr=error, marker=marker, capsize=3, **look)
        if x_ticks is not None:
            axes.set_xticks(list(x_ticks), list(x_ticks.values()))
        axes.set(xlabel=x_label, ylabel=y_label, yscale="log" if logarithmic else "linear")
        if not logarithmic:
            axes.set_ylim(bottom=0)
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=3)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _embedded(buffer.getvalue())


def _embedded(file: str) -> str:
    """The `<svg>` element of a file, for HTML: without names that other drawings of the page use too."""
    svg = file[file.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", svg)
    used = set(re.findall(r"#([\w-]+)", svg))
    return re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", svg).strip()
