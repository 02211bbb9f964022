"""User code in specs: `python:MODULE:FACTORY` names a function without arguments."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from datamerge.runtime.messages import first_line

T = TypeVar("T")

PREFIX = "python:"

# Our factories that have moved since earlier releases; artifacts and runs record the old names.
_MOVED = {"demo.digits:digit_encoder": "datamerge.demo.digits:digit_encoder"}


class NoFactory(Exception):
    """A spec names no function; the message says why, without repeating the spec."""


class Failed(Exception):
    """User code raised an exception: the message is its first line, and `__cause__` is the exception."""


def call(operation: Callable[[], T]) -> T:
    """Call user code and return its result; KeyboardInterrupt passes through.

    Raises:
        Failed: it raised any other exception, SystemExit included.
    """
    try:
        return operation()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise Failed(_described(error)) from error


def _described(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = first_line(error)
    except Exception:  # str() of the exception fails
        return name
    return name if text in ("", name) else f"{name}: {text}"


def find_factory(spec: str) -> Callable[[], Any]:
    """Import the function that a spec names, with or without the prefix `python:`.

    MODULE is looked up among the installed modules, then in the working directory, which becomes the last entry of
    sys.path. It stays there, because a factory's result may import more of its modules later.

    Raises:
        NoFactory: the spec has another form, its module or function does not exist, or importing the module fails.
    """
    module_name, function_name = _place(spec)
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise NoFactory(f"expected {PREFIX}MODULE:FACTORY")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    if importlib.util.find_spec("torchvision") is not None:
        # The user's module or factory may import torchvision, which can fail beside a CPU build of torch.
        from datamerge.runtime.torchvision_ops import make_torchvision_importable

        make_torchvision_importable()
    try:
        module = _imported(module_name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise NoFactory(f"found no module {error.name}, neither installed nor in {folder}") from None
        raise NoFactory(f"the module {module_name} cannot be imported: {first_line(error)}") from error
    except Failed as error:
        raise NoFactory(f"the module {module_name} cannot be imported: {error}") from error
    factory = getattr(module, function_name, None)
    if not callable(factory):
        where = getattr(module, "__file__", None) or module_name
        raise NoFactory(f"found no function {function_name} in {where}")
    return factory  # type: ignore[no-any-return]  # any callable will do


def module_of(spec: str) -> str:
    """The dotted name of the module that a spec names."""
    return _place(spec)[0]


def _place(spec: str) -> tuple[str, str]:
    place = spec.removeprefix(PREFIX)
    module, _, function = _MOVED.get(place, place).partition(":")
    return module, function


def _imported(name: str) -> ModuleType:
    """Import a module; raises ImportError, or Failed for any other exception of its code."""
    try:
        return call(lambda: importlib.import_module(name))
    except Failed as error:
        if isinstance(error.__cause__, ImportError):
            raise error.__cause__ from None
        raise
