"""Pictures of the documentation match their sources and load nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from docs.pictures.draw import HERE, SUMS, picture, sha256, sources
from tests.support.pages import PAGES

SOURCES = sources()
PICTURES = [picture(source) for source in SOURCES.values()]
DIAGRAMS = [source for source in SOURCES.values() if source.suffix == ".dot"]


def by_name(path: Path) -> str:
    return path.name


def test_every_picture_has_a_source_and_is_shown() -> None:
    kept = {path for path in HERE.iterdir() if path.suffix in {".svg", ".png", ".jpg"}}
    assert kept == set(PICTURES)
    text = "".join(page.read_text("utf-8") for page in PAGES)
    assert [path.name for path in PICTURES if f"pictures/{path.name})" not in text] == []


def test_pictures_are_up_to_date() -> None:
    """If it fails, run `make pictures`."""
    found = {
        picture(source).name: {
            "source": source.name,
            "source_sha256": sha256(source),
            "sha256": sha256(picture(source)),
        }
        for source in SOURCES.values()
    }
    assert json.loads(SUMS.read_text("utf-8")) == found


@pytest.mark.parametrize("source", DIAGRAMS, ids=by_name)
def test_diagrams_have_the_nodes_and_edges_of_their_source(source: Path) -> None:
    """Compared with Graphviz's own drawing, whatever the positions of nodes and edges."""
    if not shutil.which("dot"):
        pytest.skip("needs Graphviz")
    drawn = subprocess.run(["dot", "-Tsvg", str(source)], check=True, capture_output=True).stdout
    assert titles(ElementTree.fromstring(drawn)) == titles(ElementTree.parse(picture(source)).getroot())


def titles(svg: ElementTree.Element) -> list[str]:
    return sorted(str(title.text) for title in svg.iter("{http://www.w3.org/2000/svg}title"))


@pytest.mark.parametrize("path", [path for path in PICTURES if path.suffix == ".svg"], ids=by_name)
def test_svg_loads_nothing(path: Path) -> None:
    text = path.read_text("utf-8")
    links = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)|@import\s+(\S+)', text)
    targets = [target for link in links for target in link if target]
    assert [target for target in targets if not target.strip("\"'").startswith(("#", "data:"))] == []
    assert "<script" not in text
