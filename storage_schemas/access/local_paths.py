"""Paths of this machine, as a user writes them: absolute from the start, whatever the working directory is later."""

from __future__ import annotations

import os
from pathlib import Path

from storage_schemas.errors import UserError, shortened

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, of Linux and macOS


def local_part(text: str) -> str | None:
    """The path of a place on this machine, also of `file://` URLs; None for other URLs."""
    for scheme in ("file://", "local://"):
        if text.startswith(scheme):
            return text[len(scheme) :]
    return None if "://" in text else text


def user_path(text: str | os.PathLike[str]) -> Path:
    """A path with the home folder for `~`; `~name` of nobody, and `~` of somebody without a home, are names."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - pathlib raises RuntimeError for these


def absolute(text: str | os.PathLike[str]) -> str:
    """A path from the root; `~` is the home folder, `..` stays, because a link may be before it.

    Raises:
        UserError: a relative path, and a working directory that was removed; what cannot be the path of anything.
    """
    try:
        path = str(user_path(text).absolute())
    except FileNotFoundError:
        raise UserError(f"{text}: the working directory was removed; change to another one") from None
    names = os.fsencode(path).split(b"/")
    if len(os.fsencode(path)) > LONGEST_PATH or max(map(len, names)) > LONGEST_NAME or "\0" in path:
        raise UserError(
            f"expected a path of at most {LONGEST_PATH} bytes, of names of at most {LONGEST_NAME}, found "
            f"{shortened(os.fspath(text))}"
        )
    return path
