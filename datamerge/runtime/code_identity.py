"""Detects changes of the user's code: hashes the source of a module and of the user's modules that it imports.

The code is not run. Imports are followed from the module's file, also those inside functions, through all modules
that belong neither to Python nor to this distribution nor to an installed package. Comments and layout do not count.
Files and environment variables that the code reads are not covered.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from datamerge.packages import OURS

# Name of a module → the spec it was imported by, and its hash at that time: files may change while a process runs.
_known: dict[str, tuple[ModuleSpec | None, str | None]] = {}


def code_sha256(module: str) -> str | None:
    """Hash of an imported module of the user and of its imports; None for our modules and those without a file.

    Args:
        module: dotted name of the module.
    """
    spec = getattr(sys.modules.get(module), "__spec__", None)  # changes with `importlib.reload`
    if module not in _known or _known[module][0] is not spec:
        _known[module] = (spec, _hash(module, getattr(sys.modules.get(module), "__file__", None)))
    return _known[module][1]


def _hash(module: str, file: str | None) -> str | None:
    top = module.partition(".")[0]
    if top in OURS or file is None or not Path(file).is_file():
        return None
    found: dict[str, str] = {}
    waiting = [(module, Path(file))]
    while waiting:
        name, path = waiting.pop()
        if name in found:
            continue
        content = path.read_bytes()
        found[name] = hashlib.sha256(_plain(content)).hexdigest()
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for imported in sorted(_imports(content, package)):
            waiting += [(one, place) for one, place in _files(imported) if _is_users(one, place, top)]
    # The module itself comes first, without its name, so that an alias has the same hash.
    first = found.pop(module)
    return hashlib.sha256(repr((first, sorted(found.items()))).encode()).hexdigest()


def _plain(content: bytes) -> bytes:
    """Normalised source without comments; bytes that do not parse are returned unchanged."""
    try:
        return ast.unparse(ast.parse(content)).encode()
    except (SyntaxError, ValueError, RecursionError):
        return content


def _imports(content: bytes, package: str) -> set[str]:
    """Dotted names of all imports in a source; some may be attributes instead of modules."""
    try:
        nodes = list(ast.walk(ast.parse(content)))
    except (SyntaxError, ValueError, RecursionError):
        return set()
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names - {""}


def _files(name: str) -> Iterator[tuple[str, Path]]:
    """The files of a module and of the packages that contain it, as far as they exist."""
    places: Sequence[str] | None = None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        found = _spec(".".join(parts[:end]), None if places is None else tuple(places))
        if found is None:
            return
        if found.origin is not None and Path(found.origin).is_file():
            yield ".".join(parts[:end]), Path(found.origin)
        if found.submodule_search_locations is None:
            return
        places = list(found.submodule_search_locations)


def _spec(name: str, places: tuple[str, ...] | None) -> ModuleSpec | None:
    try:
        return PathFinder.find_spec(name, None if places is None else list(places))
    except (ImportError, ValueError):
        return None


def _is_users(name: str, file: Path, top: str) -> bool:
    """Whether a module is the user's: in the package `top`, or neither ours nor Python's nor installed."""
    package = name.partition(".")[0]
    if package == top:
        return True
    if package in OURS or package in sys.stdlib_module_names:
        return False
    return not any(file.is_relative_to(folder) for folder in _installed())


@cache
def _installed() -> tuple[Path, ...]:
    """Folders of installed modules, with and without links resolved."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    called = {Path(sysconfig.get_path(name)) for name in names}
    # Environments that this one extends have folders of the same name.
    called |= {Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")}
    return tuple({*called, *(folder.resolve() for folder in called)})
