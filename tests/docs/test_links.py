"""Links to pages and their headings have a target; `make docs` also checks the finished site."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

import datamerge as dm
from tests.support.pages import PAGES, name
from tests.support.paths import ROOT

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_INCLUDE = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
API = ROOT / "docs" / "api"


def text_of(page: Path) -> str:
    """The text of a page, without code blocks and with included files."""
    text = _INCLUDE.sub(lambda found: (ROOT / found[1]).read_text("utf-8"), page.read_text("utf-8"))
    return _FENCE.sub("", text)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: Path) -> None:
    for link in _LINK.findall(text_of(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f"- {page.relative_to(ROOT / 'docs')}\n" in navigation


@pytest.mark.parametrize("page", sorted(set(API.glob("*.md")) - {API / "index.md"}), ids=name)
def test_functions_named_like_their_module_are_in_the_reference(page: Path) -> None:
    """mkdocstrings takes `trainer.sampled` for the module, so the function has to be named in full."""
    text = page.read_text("utf-8")
    package = importlib.import_module(text.splitlines()[0].removeprefix("# "))
    assert f"\n::: {package.__name__}\n" in text
    for exported in package.__all__:
        where = getattr(getattr(package, exported), "__module__", "")
        if where.rpartition(".")[2] == exported:
            assert f"::: {where}.{exported}\n" in text


def test_every_public_name_is_in_the_reference() -> None:
    text = (API / "index.md").read_text("utf-8")
    assert not [name for name in dm.__all__ if callable(getattr(dm, name)) and name.islower() and name not in text]
