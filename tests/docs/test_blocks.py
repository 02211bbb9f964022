"""Python blocks in the documentation compile, and those marked with `<!-- run -->` run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pages import PAGES, blocks, name
from tests.support.paths import ROOT

# The artifact that stands for the one the pages made in an earlier step.
ARTIFACT = ROOT / "tests" / "golden" / "v1" / "zarr-uint8_moments-full"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_compiles(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, name(page), "exec")


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.mark for block in blocks(page))], ids=name)
@pytest.mark.usefixtures("modules_are_removed")
def test_marked_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other, in a folder that holds an artifact `adv-2-255`."""
    shutil.copytree(ARTIFACT, tmp_path / "adv-2-255")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.mark == "run":
            exec(compile(block.text, name(page), "exec"), names)
        elif block.mark:
            (tmp_path / block.mark.removeprefix("file: ")).write_text(block.text, "utf-8")


@pytest.fixture
def modules_are_removed() -> Iterator[None]:
    """Remove the modules and paths that a page has added."""
    modules, path = set(sys.modules), list(sys.path)
    yield
    for module in set(sys.modules) - modules:
        if module.startswith("my_"):
            del sys.modules[module]
    sys.path[:] = path
