"""Examples in docstrings give the output that they show."""

from __future__ import annotations

import doctest
import importlib
import tomllib

import pytest

from tests.support.paths import ROOT

PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["root_packages"]


def _modules_with_examples() -> list[str]:
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    with_examples = (file for file in files if ">>> " in file.read_text())
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in with_examples]


@pytest.mark.parametrize("name", _modules_with_examples())
def test_examples_in_docstrings_are_correct(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed
