"""Paths of this machine, as a user writes them: absolute from the start, whatever the working directory is later."""

from __future__ import annotations

import os
from pathlib import Path

from storage_schemas.errors import UserError


def local_part(text: str) -> str | None:
    """The path of a place on this machine, also of `file://` URLs; None for other URLs."""
    for scheme in ("file://", "local://"):
        if text.startswith(scheme):
            return text[len(scheme) :]
    return None if "://" in text else text


def absolute(text: str) -> str:
    """A path from the root; `~` is the home folder, `..` stays, because a link may be before it.

    Raises:
        UserError: a relative path, and a working directory that was removed.
    """
    try:
        return str(Path(os.path.expanduser(text)).absolute())  # noqa: PTH111 - the one that leaves `~name` as it is
    except FileNotFoundError:
        raise UserError(f"{text}: the working directory was removed; change to another one") from None
