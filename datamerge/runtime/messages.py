"""Messages to the person at the terminal, on stderr. Of several training processes the first one speaks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import click

QUIET = "DATAMERGE_QUIET"
_spell: Callable[[str], str] = str


def speak_as(spell: Callable[[str], str]) -> None:
    """From now on messages are spelt so: the command line calls settings by their flags, Python by their names."""
    global _spell
    _spell = spell


def quiet() -> bool:
    """Whether progress and hints are left out: after `datamerge --quiet`, or with DATAMERGE_QUIET=1 in Python.

    An environment variable, so that the processes that a command starts keep quiet too.
    """
    return os.environ.get(QUIET, "0") not in ("", "0")


def say(message: str) -> None:
    """Progress or a hint; nothing after `--quiet`."""
    if _speaks() and not quiet():
        click.echo(_spell(message), err=True)


def warn(message: str) -> None:
    """A warning, which is always shown."""
    if _speaks():
        click.secho(f"WARNING: {_spell(message)}", err=True, fg="yellow", bold=True)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _speaks() -> bool:
    dist = sys.modules.get("torch.distributed")  # who has not imported it is alone
    return dist is None or not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
