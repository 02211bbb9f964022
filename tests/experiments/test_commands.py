"""Commands in the READMEs of experiments and benchmarks: their modules, flags and settings files exist."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.support.paths import ROOT

# Reports in benchmarks/results are not among them: they have the commands of their commits.
PAGES = [ROOT / "benchmarks/README.md", *sorted(ROOT.glob("experiments/**/*.md"))]
# To the end of the line or of the `span`, which may continue in the next line.
COMMAND = re.compile(r"python -m ((?:benchmarks|experiments)\.[\w.]+)((?:[^\n`#]|\n(?=[^\n`]*`))*)")


def commands() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Page, module and arguments."""
    for page in PAGES:
        for module, arguments in COMMAND.findall(page.read_text("utf-8")):
            yield str(page.relative_to(ROOT)), module, tuple(shlex.split(arguments))


FOUND = sorted(set(commands()))


@pytest.mark.parametrize(("page", "module", "words"), FOUND)
def test_commands_of_a_page_are_valid(page: str, module: str, words: tuple[str, ...]) -> None:
    if module == "experiments.third_party":
        pytest.importorskip("torchattacks")
    command: click.Command = importlib.import_module(module).main
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert [word for word in words if word.startswith("--") and word not in known] == []
    assert [word for word in words if word.endswith(".toml") and not Path(ROOT, word).is_file()] == []


def test_commands_are_found() -> None:
    modules = {module for _, module, _ in FOUND}
    assert modules >= {"experiments.arms", "experiments.clusters.run", "experiments.paper.run"}
