"""Imports the four packages of this distribution, or says in one line what hides or replaces them.

A distribution on PyPI and many users' folders are also called `trainer`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

OURS = ("datamerge", "merge_service", "storage_schemas", "trainer")
ROOT = Path(__file__).resolve().parents[1]


class Unavailable(ImportError):
    """An object of this distribution cannot be imported; the one-line message says what the user can do."""


def load(module: str, attribute: str, *, extra: str, needed_by: str) -> Any:
    """Import an object from one of the four packages.

    Args:
        module: module of the object.
        attribute: name of the object in the module.
        extra: extra that installs the module's dependencies; empty if `pip install datamerge` does.
        needed_by: what the user called, for the message.

    Raises:
        Unavailable: a package of the extra is not installed, or a foreign package hides one of ours.
    """
    for name in dict.fromkeys(["storage_schemas", module.partition(".")[0]]):
        _check_not_hidden(name)
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        _check_not_overwritten()
        missing = (error.name or "").partition(".")[0]
        if not isinstance(error, ModuleNotFoundError) or missing in ("", *OURS):
            raise
        package = f"datamerge[{extra}]" if extra else "datamerge"
        raise Unavailable(f"{needed_by} needs the package {error.name!r}: pip install '{package}'") from None


def _check_not_hidden(name: str) -> None:
    """Raise Unavailable if another package of that name is imported instead of ours."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return  # the package is missing; importing it will say so
    folder = _search_folder(spec)
    if folder.resolve() == ROOT:
        return
    if entry := _python_path().get(folder):
        remedy = f"take {entry} off PYTHONPATH"
    elif owner := _owner(name, Path(spec.origin)):
        remedy = f"pip uninstall {owner}"
    else:
        remedy = "rename it, or start from another folder"
    raise Unavailable(f"expected the package {name} of datamerge, found {spec.origin} in its place; {remedy}")


def _python_path() -> dict[Path, str]:
    """The folders on PYTHONPATH, and their names in messages."""
    entries = os.environ.get("PYTHONPATH", "")
    return {
        Path(entry).absolute(): entry or "the empty entry, which is the working directory,"
        for entry in (entries.split(os.pathsep) if entries else ())
    }


def _search_folder(spec: ModuleSpec) -> Path:
    """The entry of sys.path that contains a module."""
    return Path(spec.origin or "").absolute().parents[0 if spec.submodule_search_locations is None else 1]


def _check_not_overwritten() -> None:
    """Raise Unavailable if another distribution has overwritten one of our packages."""
    for name in OURS:
        file = ROOT / name / "__init__.py"
        if owner := _owner(name, file):
            raise Unavailable(
                f"expected the package {name} of datamerge, found {file} of the distribution {owner!r}; "
                f"pip uninstall {owner}, then pip install --force-reinstall --no-deps datamerge"
            )


def _owner(package: str, file: Path) -> str | None:
    """The other distribution that installed this file of a package, if any."""
    from importlib.metadata import distribution, packages_distributions  # takes longer than all of `--help`

    for owner in packages_distributions().get(package, ()):
        if owner in (None, "datamerge"):  # None: an incomplete installation
            continue
        found = Path(str(distribution(owner).locate_file(f"{package}/{file.name}")))
        if found.resolve() == file.resolve():
            return owner
    return None
