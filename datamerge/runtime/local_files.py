"""Folders and lists on this machine, as a user names them."""

from __future__ import annotations

from pathlib import Path

from storage_schemas import ConfigError


def local_path(text: str, what: str) -> Path:
    """A folder of this machine, absolute.

    Args:
        what: is to be written there, for the message.

    Raises:
        ConfigError: a URL.
    """
    if "://" in text:
        raise ConfigError(
            f"{text}: expected a folder of this machine for {what}, found a URL; copy it there afterwards"
        )
    return Path(text).expanduser().absolute()


def read_lines(file: str, expected: str) -> list[str]:
    """Lines of a text file without the blank ones and the spaces around them.

    Args:
        expected: what the file should be, for the message.

    Raises:
        ConfigError: no such file, or an empty one.
    """
    try:
        lines = Path(file).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise ConfigError(f"{file}: expected {expected}, found {reason}") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"{file}: expected {expected}, found an empty file")
    return found
