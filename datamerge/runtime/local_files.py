"""Local folders and text files that settings name."""

from __future__ import annotations

from pathlib import Path

from storage_schemas import ConfigError
from storage_schemas.access.local_paths import absolute, user_path


def local_path(text: str, setting: str) -> Path:
    """The absolute path of a local folder.

    Args:
        text: path, as the user gave it.
        setting: name of the setting, for messages.

    Raises:
        ConfigError: it is a URL.
        UserError: it cannot be a path.
    """
    if "://" in text:
        raise ConfigError(
            f"{setting}: expected a folder of this machine, found the URL {text}; name one, and "
            "copy it there afterwards"
        )
    return Path(absolute(text))


def read_lines(file: str, setting: str, expected: str) -> list[str]:
    """The non-blank lines of a text file, stripped.

    Args:
        file: path of the file.
        setting: name of the setting, for messages.
        expected: description of the file, for messages.

    Raises:
        ConfigError: the file is missing or empty.
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
