"""Folders and lists on this machine, as a user names them."""

from __future__ import annotations

from pathlib import Path

from storage_schemas import ConfigError
from storage_schemas.access.local_paths import absolute, user_path


def local_path(text: str, setting: str) -> Path:
    """A folder of this machine, absolute.

    Args:
        setting: that names it, for the message.

    Raises:
        ConfigError: a URL.
        UserError: what cannot be a path.
    """
    if "://" in text:
        raise ConfigError(
            f"{setting}: expected a folder of this machine, found the URL {text}; copy it there afterwards"
        )
    return Path(absolute(text))


def read_lines(file: str, setting: str, expected: str) -> list[str]:
    """Lines of a text file without the blank ones and the spaces around them.

    Args:
        setting: that names the file, for the message.
        expected: what the file should be, for the message.

    Raises:
        ConfigError: no such file, or an empty one.
    """
    try:
        lines = user_path(file).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise ConfigError(f"{setting}: expected {expected} at {file}, found {reason}") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"{setting}: expected {expected} at {file}, found an empty one")
    return found
