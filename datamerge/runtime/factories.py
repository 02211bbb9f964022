"""The user's own code in specs: `python:MODULE:FACTORY` names a function without arguments."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PREFIX = "python:"

# Factories of ours that artifacts, runs and compose files of earlier releases name by another place.
_MOVED = {"demo.digits:digit_encoder": "datamerge.demo.digits:digit_encoder"}


class NoFactory(Exception):  # noqa: N818
    """A spec that leads to no function; the message says why and does not repeat the spec."""


def find_factory(spec: str) -> Callable[[], Any]:
    """The function that a spec names, with or without `python:` in front.

    MODULE is looked for among what is installed and then in the working directory. That becomes the last entry of
    sys.path, and stays there: what a factory returns may import more of its modules later.

    Raises:
        NoFactory: another form, no such module or function, or a module whose own imports fail.
    """
    place = spec.removeprefix(PREFIX)
    module_name, _, function_name = _MOVED.get(place, place).partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise NoFactory(f"expected {PREFIX}MODULE:FACTORY")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise NoFactory(f"found no module {error.name}, neither installed nor in {folder}") from None
        raise NoFactory(f"the module {module_name} cannot be imported: {error}") from None
    factory = getattr(module, function_name, None)
    if not callable(factory):
        where = getattr(module, "__file__", None) or module_name
        raise NoFactory(f"found no function {function_name} in {where}")
    return factory  # type: ignore[no-any-return]
