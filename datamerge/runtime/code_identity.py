"""What tells code of the user's from what it was before: a hash of its source, and of what it imports of theirs.

Found without running anything: from a module's file along its imports, also those inside functions, through all
modules that are neither installed nor Python's nor ours. Comments and layout do not count. What code reads besides
its weights, such as files and the environment, is not seen.
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

# Name of a module → what it was imported by, and its hash then: files may change under a process that runs.
_known: dict[str, tuple[ModuleSpec | None, str | None]] = {}


def code_sha256(module: str) -> str | None:
    """Hash of a module that has been imported and of its own imports; None for ours, or one without a file.

    Args:
        module: its dotted name.
    """
    spec = getattr(sys.modules.get(module), "__spec__", None)  # another one after `importlib.reload`
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
            waiting += [(one, place) for one, place in _files(imported) if _is_own(one, place, top)]
    # The module itself first, without its name: an alias is the same code.
    first = found.pop(module)
    return hashlib.sha256(repr((first, sorted(found.items()))).encode()).hexdigest()


def _plain(content: bytes) -> bytes:
    """Source as Python writes it, without comments; bytes that are no source as they are."""
    try:
        return ast.unparse(ast.parse(content)).encode()
    except (SyntaxError, ValueError, RecursionError):
        return content


def _imports(content: bytes, package: str) -> set[str]:
    """Dotted names that may be modules, of all imports in a source."""
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
    """A module and the packages around it that have files, as far as they are found."""
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


def _is_own(name: str, file: Path, top: str) -> bool:
    """Whether a module is the user's: of the factory's package, or neither ours nor Python's nor installed."""
    package = name.partition(".")[0]
    if package == top:
        return True
    if package in OURS or package in sys.stdlib_module_names:
        return False
    return not any(file.is_relative_to(folder) for folder in _installed())


@cache
def _installed() -> tuple[Path, ...]:
    """Folders of what is installed, as they are called and as they are."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    called = {Path(sysconfig.get_path(name)) for name in names}
    # Other environments that this one looks into are called the same.
    called |= {Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")}
    return tuple({*called, *(folder.resolve() for folder in called)})
