"""Lines to the person in front of a run."""

from __future__ import annotations

import click
import torch.distributed as dist

from datamerge.runtime import quiet


def say(message: str) -> None:
    """One line to the person in front, on stderr, unless told to be quiet; of several processes the first speaks."""
    if _speaks() and not quiet():
        click.echo(message, err=True)


def warn(message: str) -> None:
    """A warning that should not be overlooked; of several processes the first gives it."""
    if _speaks():
        click.secho(f"WARNING: {message}", err=True, fg="yellow", bold=True)


def _speaks() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
