"""The built site is self-contained and has no raw TeX; it works in a browser from the disk, without a network."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.browser import CHROMIUM, Page, browser
from tests.support.paths import ROOT

MISSING = [name for name in ("mkdocs", "material", "mkdocstrings", "math_core") if not importlib.util.find_spec(name)]
# In one group, so that the site is built once.
pytestmark = [
    pytest.mark.xdist_group("site"),
    pytest.mark.skipif(bool(MISSING), reason=f"needs '.[docs]': no {', '.join(MISSING)}"),
]
WITH_BROWSER = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")

TEX = re.compile(r"\\[A-Za-z]+|\\[()\[\]]|\$\$|\barithmatex\b")
# Elements whose text is not prose.
QUOTED = {"code", "pre", "script", "style"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Reader(HTMLParser):
    """The files that a page loads, and its text without code."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""
        self.formulas = 0
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag not in VOID:
            self._open.append(tag)
        self.formulas += tag == "math"
        if tag == "link" and values.get("rel") not in {"next", "prev", "canonical"}:
            self.loads.append(values["href"])
        elif tag not in {"a", "link"}:
            self.loads += [
                values[name] for name in ("src", "srcset", "data", "poster", "background") if values.get(name)
            ]
        self.loads += urls(values.get("style", ""))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            self.loads += urls(data)
        if not QUOTED & set(self._open):
            self.text += data


def urls(css: str) -> list[str]:
    return [link.strip("\"' ") for link in re.findall(r"url\(([^)]*)\)", css)] + re.findall(
        r"@import\s+[\"'](.+?)[\"']", css
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Reader]:
    found = {}
    for path in sorted(site.rglob("*.html")):
        reader = Reader()
        reader.feed(path.read_text("utf-8"))
        found[str(path.relative_to(site))] = reader
    return found


def test_pages_load_files_of_the_site_only(site: Path, pages: dict[str, Reader]) -> None:
    for name, page in pages.items():
        for link in page.loads:
            if not link.startswith("data:"):
                # Servers show 404.html at any path, so its links begin at the root.
                where = site / link.lstrip("/") if name == "404.html" else (site / name).parent / link
                assert Path(unquote(urlsplit(str(where)).path)).is_file(), (name, link)


def test_style_sheets_load_files_of_the_site_only(site: Path) -> None:
    sheets = list(site.rglob("*.css"))
    assert any(urls(sheet.read_text("utf-8")) for sheet in sheets)
    for sheet in sheets:
        for link in urls(sheet.read_text("utf-8")):
            assert link.startswith("data:") or (sheet.parent / link).is_file(), (sheet.name, link)


def test_pages_have_no_raw_tex(pages: dict[str, Reader]) -> None:
    assert {name: found for name, page in pages.items() if (found := TEX.findall(page.text))} == {}
    assert pages["math.html"].formulas > 100


def test_the_index_of_the_search_has_no_raw_tex(site: Path) -> None:
    entries = json.loads((site / "search" / "search_index.json").read_text("utf-8"))["docs"]
    texts = [re.sub(r"<code>.*?</code>", "", entry["text"], flags=re.DOTALL) for entry in entries]
    assert [text for text in texts if TEX.search(text)] == []


@pytest.fixture(scope="module")
def tab(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


TOO_WIDE = """[...document.querySelectorAll("pre, pre code")]
  .filter(block => block.scrollWidth > block.clientWidth).map(block => block.innerText.slice(0, 80))"""


# Every kind of page: prose, formulas, diagrams, the longest command lines, tables of options, signatures.
VIEWED = ("index", "math", "concepts", "how-to/cluster", "cli", "api/trainer")


@WITH_BROWSER
@pytest.mark.parametrize("name", VIEWED)
def test_no_request_leaves_and_no_line_of_code_scrolls(site: Path, tab: Page, name: str) -> None:
    tab.window(1280, 900)
    tab.open((site / f"{name}.html").as_uri())
    wide, width = tab.evaluate(f"[{TOO_WIDE}, document.documentElement.scrollWidth]")
    assert (wide, width) == ([], 1280)
    assert tab.requests
    assert [url for url in tab.requests if not url.startswith(site.as_uri())] == []
    assert tab.errors == []


@WITH_BROWSER
@pytest.mark.parametrize("dark", [False, True])
def test_fonts_are_those_of_the_site_in_light_and_dark(site: Path, tab: Page, dark: bool) -> None:
    tab.window(1280, 900, dark=dark)
    tab.open((site / "math.html").as_uri())
    # The theme stores the scheme of the first visit.
    tab.evaluate("localStorage.clear()")
    tab.open((site / "math.html").as_uri())
    assert tab.evaluate("document.body.dataset.mdColorScheme") == ("slate" if dark else "default")
    loaded = tab.wait_for(
        "document.fonts.ready.then(all => [...all].filter(one => one.status == 'loaded').map(one => one.family))"
    )
    assert {family.strip('"') for family in loaded} == {"Roboto", "Roboto Mono", "Noto Sans Math"}
    red, green, blue = tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (red + green + blue < 150) is dark


@WITH_BROWSER
def test_search_finds_a_page_from_the_disk(site: Path, tab: Page) -> None:
    tab.open((site / "index.html").as_uri())
    tab.evaluate("document.querySelector('[data-md-component=search-query]').focus()")
    tab.call("Input.insertText", text="sidecar")
    found = tab.wait_for(
        "(all => all.length && all)([...document.querySelectorAll('.md-search-result__link')].map(link => link.href))"
    )
    assert any(url.startswith((site / "concepts.html").as_uri()) for url in found)
    assert [url for url in tab.requests if not url.startswith(site.as_uri())] == []


@WITH_BROWSER
def test_code_is_copied_line_by_line(site: Path, tab: Page) -> None:
    """Each line is a separate block, which must not double the line breaks."""
    tab.open((site / "quickstart.html").as_uri())
    texts = tab.evaluate("[...document.querySelectorAll('pre code')].map(block => block.innerText)")
    source = (ROOT / "docs" / "quickstart.md").read_text("utf-8")
    assert [text for text in texts if text.strip("\n") not in source] == []
