"""What a page consists of, and the page as HTML. The looks are in `page.html`."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:
    from jinja2 import Environment

SMALL = 96  # pixels a side up to which a picture is enlarged without smoothing


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        header: names of the columns; empty for a table without a header.
        rows: a list of cells each.
        names: columns at the left that hold text; the others hold numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1


@dataclass(frozen=True)
class Chart:
    """A drawing.

    Attributes:
        svg: an `<svg>` element, inserted as it is.
        caption: what it shows.
    """

    svg: str
    caption: str


@dataclass(frozen=True)
class Tile:
    """One picture of a strip.

    Attributes:
        caption: what it shows.
        pixels: uint8 [H, W, 3].
        note: a second line below, in small letters.
    """

    caption: str
    pixels: npt.NDArray[np.uint8]
    note: str = ""

    @property
    def url(self) -> str:
        """The picture itself, as a PNG in a `data:` URL."""
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    @property
    def small(self) -> bool:
        """Whether its pixels are to be seen as squares."""
        return bool(max(self.pixels.shape[:2]) <= SMALL)


@dataclass(frozen=True)
class Strip:
    """Pictures in a row that belong together.

    Attributes:
        tiles: the pictures.
        title: a line above them.
        lines: text below them, as (name, text).
    """

    tiles: Sequence[Tile]
    title: str = ""
    lines: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Folded:
    """Text that is shown on demand, such as settings.

    Attributes:
        summary: the line that unfolds it.
        text: printed as it is, in letters of one width.
    """

    summary: str
    text: str


@dataclass(frozen=True)
class Section:
    """A heading with what belongs to it, in this order.

    Attributes:
        title: the heading.
        text: paragraphs.
        warnings: paragraphs that must not be missed.
        table: a table.
        notes: paragraphs in small letters below the table.
        charts: drawings.
        strips: rows of pictures.
        folded: what is shown on demand.
    """

    title: str
    text: Sequence[str] = ()
    warnings: Sequence[str] = ()
    table: Table | None = None
    notes: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    strips: Sequence[Strip] = ()
    folded: Sequence[Folded] = ()


def render(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page; the same contents give the same text.

    Args:
        title: of the page.
        lead: what it shows, in a sentence or two.
        sections: from top to bottom.
    """
    return _environment().get_template("page.html").render(title=title, lead=lead, sections=sections)


def table_html(table: Table) -> str:
    """A `<table>` for a notebook."""
    macros = vars(_environment().get_template("macros.html").module)
    return str(macros["grid"](table)).strip()


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
