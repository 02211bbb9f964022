"""Lists that a user keeps as text files."""

from __future__ import annotations

from pathlib import Path

from storage_schemas import ConfigError


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
