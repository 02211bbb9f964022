"""The diagram of docs/architecture.md against the imports in the code and the contracts of import-linter."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import grimp

from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
DIAGRAM = (ROOT / "docs" / "pictures" / "architecture.dot").read_text("utf-8")
CONTRACTS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
# Not in the diagram, because they import everything.
ABOVE = {"benchmarks", "experiments", "datamerge.__main__"}

Edges = set[tuple[str, str]]


def drawn() -> Edges:
    return {(above, below) for above, below in re.findall(r"^ +(\w+) -> (\w+)$", DIAGRAM, re.MULTILINE)}


def closure(edges: Edges) -> Edges:
    reach = set(edges)
    while True:
        more = {(a, d) for a, b in reach for c, d in reach if b == c} - reach
        if not more:
            return reach
        reach |= more


def contract(kind: str) -> Any:
    return next(found for found in CONTRACTS["contracts"] if found["type"] == kind)


def layers() -> list[set[str]]:
    """Packages by layer, the topmost first."""
    found = [set(layer.split(" | ")) - ABOVE for layer in contract("layers")["layers"]]
    return [layer for layer in found if layer]


def exceptions() -> set[str]:
    """Imports that the contracts allow for single files."""
    return {entry for found in CONTRACTS["contracts"] for entry in found.get("ignore_imports", [])}


def short(module: str) -> str | None:
    """The diagram's name of the package that a module is in; None if it is not drawn."""
    packages = (package for layer in layers() for package in layer)
    found = next((package for package in packages if f"{module}.".startswith(f"{package}.")), None)
    return found and found.rpartition(".")[2]


def test_arrows_are_the_imports_of_the_code() -> None:
    graph = grimp.build_graph(*CONTRACTS["root_packages"], cache_dir=None)
    package = {module: short(module) for module in graph.modules}
    imports = {
        (above, below)
        for module in graph.modules
        for other in graph.find_modules_directly_imported_by(module)
        if (above := package[module]) and (below := package[other]) and above != below
        if f"{module} -> {other}" not in exceptions()
    }
    assert closure(drawn()) == closure(imports)


def test_no_arrow_is_implied_by_others() -> None:
    for edge in drawn():
        assert edge not in closure(drawn() - {edge})


def test_layers_are_those_of_the_contract() -> None:
    boxes = re.findall(r"^ +subgraph \w+ \{\n +label=.+?\n(.*?)^ +\}$", DIAGRAM, re.MULTILINE | re.DOTALL)
    assert [set(box.split()) for box in boxes] == [set(map(short, layer)) for layer in layers()]
    level = {short(package): index for index, layer in enumerate(layers()) for package in layer}
    assert all(level[above] < level[below] for above, below in drawn())


def test_dotted_arrows_are_the_exceptions() -> None:
    lines = re.findall(r"^ +(\w+) -> (\w+) \[label=\"(.+)\" style=dashed\]$", DIAGRAM, re.MULTILINE)
    dotted = {f"{a}.{file} -> {b}" for a, b, files in lines for file in files.split(r"\n")}
    assert dotted == {entry.removeprefix("datamerge.").replace(" datamerge.", " ") for entry in exceptions()}


def test_no_arrow_is_forbidden_and_every_contract_is_explained() -> None:
    for found in CONTRACTS["contracts"]:
        assert f"| {found['name']} |" in PAGE
        if found["type"] == "forbidden":
            pairs = {(short(a), short(b)) for a in found["source_modules"] for b in found["forbidden_modules"]}
            assert not pairs & drawn()
