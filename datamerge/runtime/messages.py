"""Messages to the user, on stderr. Among several training processes, only the first one prints them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import click

QUIET = "DATAMERGE_QUIET"
_spell: Callable[[str], str] = str


def speak_as(spell: Callable[[str], str]) -> None:
    """Set how messages spell settings: the command line uses flags, Python the names of fields."""
    global _spell
    _spell = spell


def quiet() -> bool:
    """Whether to print no progress and no hints: after `datamerge --quiet`, or with DATAMERGE_QUIET=1.

    It is an environment variable, so that the processes that a command starts are quiet too.
    """
    return os.environ.get(QUIET, "0") not in ("", "0")


def say(message: str) -> None:
    """Print a hint or progress, unless quiet."""
    if _speaks() and not quiet():
        click.echo(_spell(message), err=True)


def warn(message: str) -> None:
    """Print a warning, even if quiet."""
    if _speaks():
        click.secho(f"WARNING: {_spell(message)}", err=True, fg="yellow", bold=True)


def first_line(error: BaseException) -> str:
    """The first non-blank line of an error's message, or the name of its class without one."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _speaks() -> bool:
    dist = sys.modules.get("torch.distributed")  # not imported: a single process
    return dist is None or not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
