"""Messages to the person at the terminal, on stderr. Of several training processes the first one speaks."""

from __future__ import annotations

import sys

import click

from datamerge.runtime.verbosity import quiet


def say(message: str) -> None:
    """Progress or a hint; nothing after `--quiet`."""
    if _speaks() and not quiet():
        click.echo(message, err=True)


def warn(message: str) -> None:
    """A warning, which is always shown."""
    if _speaks():
        click.secho(f"WARNING: {message}", err=True, fg="yellow", bold=True)


def _speaks() -> bool:
    dist = sys.modules.get("torch.distributed")  # who has not imported it is alone
    return dist is None or not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
