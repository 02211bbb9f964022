"""Local paths as a user writes them, made absolute at once, so that a later change of directory does not matter."""

from __future__ import annotations

import os
from pathlib import Path

from storage_schemas.errors import UserError, shortened

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, on Linux and macOS


def local_part(text: str) -> str | None:
    """The path of a local path or `file://` URL; None for other URLs."""
    for scheme in ("file://", "local://"):
        if text.startswith(scheme):
            return text[len(scheme) :]
    return None if "://" in text else text


def user_path(text: str | os.PathLike[str]) -> Path:
    """Expand `~` and `~name` to home folders; kept literally where there is no such user or home."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - pathlib raises RuntimeError for these


def absolute(text: str | os.PathLike[str]) -> str:
    """An absolute path with `~` expanded; `..` is kept, because the folder before it may be a link.

    Raises:
        UserError: the path is relative and the working directory was removed; the path or a name in it is too long,
            or it contains a NUL.
    """
    try:
        path = str(user_path(text).absolute())
    except FileNotFoundError:
        raise UserError(f"{text}: the working directory was removed; change to another one") from None
    names = os.fsencode(path).split(b"/")
    if len(os.fsencode(path)) > LONGEST_PATH or max(map(len, names)) > LONGEST_NAME or "\0" in path:
        raise UserError(
            f"expected a path of at most {LONGEST_PATH} bytes, with names of at most {LONGEST_NAME}, found "
            f"{shortened(os.fspath(text))}"
        )
    return path
