"""Every report is one self-contained page that agrees with the results and is readable in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from datamerge.evaluation.reports import to_html
from datamerge.evaluation.tables import read_results, table_rows
from datamerge.runtime.pages import Section, Strip, Table, Tile, render, table_html
from datamerge.runtime.pages.charts import Series, draw
from storage_schemas import open_artifact
from storage_schemas.display import rgb
from tests.pages.conftest import ARMS, ARTIFACT
from tests.support.html_pages import Page, open_in_browser


def test_an_evaluation_page_shows_the_stored_results(evaluation_folder: Path) -> None:
    content = (evaluation_folder / "report.html").read_text("utf-8")
    page = Page(content)
    stored = json.loads((evaluation_folder / "results.json").read_text("utf-8"))["arms"]
    header, *rows = page.tables[0]
    assert [row[0] for row in rows] == list(ARMS)
    for arm in stored:
        (row,) = (row for row in rows if row[0] == arm["arm"])
        for score in arm["scores"]:
            value, error, low, high = map(float, re.findall(r"[\d.]+", row[header.index(score["name"])]))
            assert (value, low, high) == pytest.approx((score["value"], score["low"], score["high"]), abs=0.05)
            assert error == pytest.approx(score["error"], abs=0.05)
    # One drawing each for accuracy, loss and top-1, with the arms in the legend.
    assert len(page.drawings) == 3
    assert all(set(ARMS) <= set(drawing) and {"0", "2/255"} <= set(drawing) for drawing in page.drawings)
    assert "s3://bucket/a" in page.tables[1][2]
    assert to_html(table_rows(read_results(evaluation_folder / "results.json"))) == content, "the same every time"


def test_pictures_show_the_perturbation_and_the_classes(evaluation_folder: Path) -> None:
    page = Page((evaluation_folder / "report.html").read_text("utf-8"))
    names = ["image", "image", "perturbation × 4", "adversarial image"]
    assert [name for name, _ in page.pictures] == names * 2 * len(ARMS)
    _, (_, clean), (_, perturbation), (_, adversarial) = page.pictures[:4]
    offset = np.asarray(adversarial).astype(int) - np.asarray(clean)
    assert list(zip(*offset.nonzero(), strict=True)) == [(0, 0, 0)]
    # 0.1 of the range is 25.5 levels, times 4; all else is grey.
    assert np.asarray(perturbation)[0, 0].tolist() == [230, 128, 128]
    assert set(np.asarray(perturbation)[1:].ravel().tolist()) == {128}
    words = " ".join(page.text.split())
    assert words.count("before: tench after: no attack succeeded reference: tench") == 2 * len(ARMS)
    assert words.count("before: tench after (ε = 2/255): goldfish reference: tench") == 2 * len(ARMS)


def test_the_demo_explains_its_columns(demo_page: str) -> None:
    page = Page(demo_page)
    assert all(
        f"{column} is" in page.text for column in ("loss clean", "loss adv.", "accuracy clean", "accuracy robust")
    )
    # The loss under attack and the accuracy under attack of the second arm are both above the first one's.
    assert "Here both are higher than those of w/o AT (2 and 40.0 %) for AT-5-Avg (3 and 55.0 %)." in page.text
    assert any("training loss" in drawing for drawing in page.drawings)


def test_a_preview_shows_the_stored_means_and_facts(preview_page: str) -> None:
    page = Page(preview_page)
    artifact = open_artifact(ARTIFACT)
    first, last = artifact[0], artifact[len(artifact) - 1]
    assert first.key in page.text
    assert last.key in page.text
    means = [np.asarray(image) for name, image in page.pictures if name == "mean"]
    for image, record in zip(means, (first, last), strict=True):
        np.testing.assert_array_equal(image, rgb((record.mean * 255).round().astype(np.uint8)))
    facts = dict(page.tables[0])
    assert facts["groups"].startswith(f"{len(artifact)} of ")


def test_foreign_text_is_escaped() -> None:
    tile = Tile("<i>", np.zeros((2, 3, 3), np.uint8), "<u>")
    section = Section(
        "<h1>", ["<p>"], ["<b>"], Table(["<th>"], [["</td>"]]), strips=[Strip([tile], "<s>", [("<q>", "&")])]
    )
    page = Page(render("</title>", "<em>", [section]))
    assert all(text in page.text for text in ("</title>", "<em>", "<h1>", "<p>", "<b>", "<u>", "<s>", "<q>", "&"))
    assert page.tables == [[["<th>"], ["</td>"]]]
    ((name, image),) = page.pictures
    assert (name, image.size) == ("<i>", (3, 2))
    assert Page(table_html(Table([], [["<x>", "1"]]))).tables == [[["<x>", "1"]]]


def test_a_drawing_uses_the_colours_of_the_page() -> None:
    points = [
        Series("a", [0, 1], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5]),
        Series("b", [0, 1], [3.0, 4.0], [3, 4], [3, 4]),
    ]
    ticks = {0.0: "none", 1.0: "1/255"}
    svg = draw(points, x_label="ε", y_label="loss", x_ticks=ticks)
    assert svg is not None
    assert svg == draw(points, x_label="ε", y_label="loss", x_ticks=ticks)
    assert {"none", "1/255", "ε", "loss", "a", "b"} <= set(Page(svg).drawings[0])
    assert "currentColor" in svg
    assert not re.search(r"#000000|white|black|http", svg)
    names = re.findall(r' id="([^"]+)"', svg)
    assert len(names) == len(set(names))
    assert all(f"#{name}" in svg for name in names)


@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_every_page(
    evaluation_folder: Path, demo_page: str, preview_page: str, tmp_path: Path, dark: bool
) -> None:
    """Nothing is loaded, no picture is broken, and no page is wider than a screen or a phone."""
    pages = {
        "evaluation": (evaluation_folder / "report.html").read_text("utf-8"),
        "demo": demo_page,
        "preview": preview_page,
    }
    found = open_in_browser(pages, tmp_path, dark=dark)
    assert len(found) == 2 * len(pages)
    for page in found:
        assert page["scrolled"] <= int(page["width"]), page
        assert (page["broken"], page["loaded"]) == (0, []), page
        ground, ink = (sum(map(int, re.findall(r"\d+", page[name])[:3])) for name in ("background", "ink"))
        assert (ground < 120 < 600 < ink) if dark else (ink < 120 < 600 < ground), page
        assert all(height > 100 for height in page["drawn"]), page
        assert page["axis"] in (None, page["ink"]), page
