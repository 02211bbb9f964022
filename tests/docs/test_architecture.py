"""The diagram of docs/architecture.md against the imports in the code and the contracts of import-linter."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import grimp

from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
CONTRACTS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
PACKAGES: list[str] = CONTRACTS["root_packages"]

Edges = set[tuple[str, str]]


def diagram() -> str:
    found = re.search(r"^```mermaid\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def drawn() -> Edges:
    return {(above, below) for above, below in re.findall(r"^ +(\w+) --> (\w+)$", diagram(), re.MULTILINE)}


def closure(edges: Edges) -> Edges:
    reach = set(edges)
    while True:
        more = {(a, d) for a, b in reach for c, d in reach if b == c} - reach
        if not more:
            return reach
        reach |= more


def contract(kind: str) -> Any:
    return next(found for found in CONTRACTS["contracts"] if found["type"] == kind)


def test_arrows_are_the_imports_of_the_code() -> None:
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    package = {module: module.partition(".")[0] for module in graph.modules}
    imports = {
        (package[module], package[other])
        for module in graph.modules
        for other in graph.find_modules_directly_imported_by(module)
        if package[module] != package[other]
    }
    assert closure(drawn()) == closure(imports)


def test_no_arrow_follows_from_others() -> None:
    for edge in drawn():
        assert edge not in closure(drawn() - {edge})


def test_layers_are_those_of_the_contract() -> None:
    boxes = re.findall(r"^ +subgraph \w+ \[.+?\]\n(.*?)^ +end$", diagram(), re.MULTILINE | re.DOTALL)
    layers = [set(re.split(r" \| ", layer)) for layer in contract("layers")["layers"]]
    assert [set(box.split()) for box in boxes] == layers
    level = {package: index for index, layer in enumerate(layers) for package in layer}
    assert set(level) == set(PACKAGES)
    assert all(level[above] < level[below] for above, below in drawn())


def test_dotted_arrows_are_the_files_that_know_ray() -> None:
    dotted = {f"{a}.{file} -> {b}" for a, file, b in re.findall(r"^ +(\w+) -\. (\w+) \.-> (\w+)$", diagram(), re.M)}
    allowed = [entry for found in CONTRACTS["contracts"] for entry in found.get("ignore_imports", [])]
    assert dotted == set(allowed)


def test_no_arrow_is_forbidden_and_every_contract_is_explained() -> None:
    for found in CONTRACTS["contracts"]:
        assert f"| {found['name']} |" in PAGE
        if found["type"] == "forbidden":
            pairs = {(a, b) for a in found["source_modules"] for b in found["forbidden_modules"]}
            assert not pairs & drawn()
