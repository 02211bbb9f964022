"""Text and HTML representations of artifacts and records; foreign names are always escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage_schemas import Artifact, ArtifactWriter, Layout, Location, Record, open_artifact
from storage_schemas.card.finish import finish
from storage_schemas.display import LARGEST_SIDE, mean_and_variance
from storage_schemas.operations.diff import diff
from storage_schemas.verify import verify

Write = Callable[..., list[Record]]
HOSTILE = "</td><script>alert(1)</script>\"'&\x1b[31m\n<img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """The tags, attributes and text of a piece of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.pictures: list[bytes] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        source = dict(attrs).get("src")
        if source is not None:
            self.pictures.append(base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True))

    def handle_data(self, data: str) -> None:
        self.text += data


def _page(shown: Artifact | Record) -> Page:
    page = Page(shown._repr_html_())
    assert page.tags <= {"div", "b", "table", "tr", "th", "td", "img"}
    assert page.attributes <= {"alt", "style", "src"}
    assert not any(ord(letter) < 32 for letter in page.text)
    return page


@pytest.fixture
def artifact(tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, format_name: str) -> Artifact:
    write_artifact(tmp_path / "a", layout := make_layout(format_name), (1,))
    finish(ArtifactWriter(Location(tmp_path / "a"), layout, open_artifact(tmp_path / "a").manifest.provenance))
    return open_artifact(tmp_path / "a")


def test_every_repr_fits_on_one_line(artifact: Artifact, tmp_path: Path) -> None:
    found = [artifact, artifact.manifest, artifact[0], verify(artifact.location), diff(artifact, artifact)]
    for thing in found:
        line = repr(thing)
        assert line == str(thing)
        assert line.startswith(f"<{type(thing).__name__}")
        assert len(line) < 160 + len(str(tmp_path))
        assert "\n" not in line
    for fact in (str(tmp_path), "6 groups", "3 of 3 shards", "[3, 4, 5]", "uint8_moments"):
        assert fact in repr(artifact)
    assert "sound" in repr(found[3])
    assert "equal" in repr(found[4])


def test_a_notebook_shows_an_artifact_with_its_contact_sheet(artifact: Artifact, tmp_path: Path) -> None:
    page = _page(artifact)
    sheet = tmp_path / "a" / "preview.png"
    assert page.pictures == [sheet.read_bytes()]
    assert "6, in 3 of 3 shards" in page.text
    assert "members" in page.text
    sheet.write_bytes(sheet.read_bytes()[:-1])
    assert _page(artifact).pictures == []
    sheet.unlink()
    assert _page(artifact).pictures == []


def test_a_notebook_shows_a_record_with_its_moments(artifact: Artifact) -> None:
    record = artifact["k2"]
    page = _page(record)
    (picture,) = page.pictures
    with Image.open(io.BytesIO(picture)) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (4, 10, 3)
    np.testing.assert_array_equal(pixels[:, :5], (255 * record.mean).round().astype(np.uint8).transpose(1, 2, 0))
    largest = np.unravel_index(record.variance.mean(axis=0).argmax(), (4, 5))
    assert pixels[:, 5:][largest].tolist() == [255, 255, 255]
    assert "k2" in page.text
    assert _page(artifact.only(["target"])[0]).pictures == []


def test_large_pictures_are_subsampled() -> None:
    image = np.zeros((1, 3 * LARGEST_SIDE, 40), np.float32)
    with Image.open(io.BytesIO(mean_and_variance(image, image))) as picture:
        assert picture.size == (2 * 14, LARGEST_SIDE)


def test_hostile_names_are_escaped(artifact: Artifact, tmp_path: Path) -> None:
    """Names of a folder, a key, a sample and an array; an artifact cannot hold the last three, a `Record` can."""
    record = artifact[0]
    arrays = {**record.arrays, HOSTILE: np.zeros(1, np.float32)}
    page = _page(replace(record, key=HOSTILE, samples=(HOSTILE,), info={HOSTILE: 1.0}, arrays=arrays))
    assert page.text.count("<script>alert(1)</script>") >= 3
    (tmp_path / "a").rename(folder := tmp_path / HOSTILE.replace("/", "|"))
    page = _page(open_artifact(folder))
    assert "<|td><script>alert(1)<|script>" in page.text
    for line in (repr(open_artifact(folder)), repr(replace(record, key=HOSTILE)), repr(verify(Location(folder)))):
        assert not any(ord(letter) < 32 for letter in line)
