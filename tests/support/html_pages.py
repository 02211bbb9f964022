"""HTML pages parsed by Python, and rendered by Chromium where it is installed."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

VOID = {"meta", "link", "img", "br", "input", "hr"}
# Attributes that make a browser load something.
LOADED = {"src", "href", "xlink:href", "srcset", "data", "poster", "action", "style", "clip-path"}


class Page(HTMLParser):
    """A self-contained page; parsing checks that it loads nothing and closes every element.

    Attributes:
        pictures: all images, decoded, with their alternative texts.
        tables: cells by table and row.
        drawings: texts of each `<svg>`.
        text: all text that is shown.
    """

    def __init__(self, content: str) -> None:
        super().__init__()
        self.pictures: list[tuple[str, Image.Image]] = []
        self.tables: list[list[list[str]]] = []
        self.drawings: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(content)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert tag not in ("script", "iframe", "object", "embed"), tag
        assert not [name for name in given if name.startswith("on")]
        for name in LOADED & set(given):
            assert not re.search(r"//|@import", given[name].partition(",")[0]), given[name][:80]
        if tag == "img":
            kind, _, data = given["src"].partition(",")
            assert kind == "data:image/png;base64"
            with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
                image.load()
                self.pictures.append((given["alt"], image))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "svg":
            self.drawings.append([])
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["style"]:
            assert not re.search(r"url\(|@import|@font-face", data)
            return
        if self._open[-1:] in (["td"], ["th"]):
            self.tables[-1][-1][-1] += data
        if self._open[-1:] == ["text"]:
            self.drawings[-1].append(data)
        self.text += data


# Every page in a frame of a screen's width and in one of a phone's; the measurements go into the title.
_FRAMES = """<!DOCTYPE html><meta charset="utf-8"><body>{frames}<script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, view = frame.contentWindow;
    return {{
      page: frame.name, width: frame.width, scrolled: page.documentElement.scrollWidth,
      broken: [...page.images].filter(image => !image.complete || !image.naturalWidth).length,
      loaded: view.performance.getEntriesByType("resource").map(entry => entry.name)
        .filter(name => !name.startsWith("data:")),
      background: view.getComputedStyle(page.body).backgroundColor,
      ink: view.getComputedStyle(page.body).color,
      drawn: [...page.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().height),
      axis: [...page.querySelectorAll("svg text")].map(text => view.getComputedStyle(text).fill)[0] ?? null,
    }};
  }});
  document.title = JSON.stringify(found);
}});
</script>"""


def open_in_browser(pages: dict[str, str], folder: Path, *, dark: bool) -> list[dict[str, Any]]:
    """Measurements of pages in Chromium without a network, 1,280 and 390 pixels wide; skips without Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    frames = "".join(
        f'<iframe name="{name}" width="{width}" height="800" srcdoc="{escape(content)}"></iframe>'
        for name, content in pages.items()
        for width in (1280, 390)
    )
    file = folder / "frames.html"
    file.write_text(_FRAMES.format(frames=frames), "utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command += ["--dump-dom", file.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    title = re.search(r"<title>(.*?)</title>", dumped, re.DOTALL)
    assert title, dumped[:500]
    found: list[dict[str, Any]] = json.loads(title[1].replace("&amp;", "&"))
    return found
