"""All errors that the package raises on purpose.

    DatamergeError            exit code 1: the work failed
    ├── UserError             exit code 2: the request was wrong, nothing was touched
    │   ├── ConfigError           a setting, or a combination of them
    │   ├── SourceError           raw data that cannot be found or listed
    │   └── NotAnArtifact         a location that holds no artifact, or another one
    ├── SchemaError           a manifest or commit that does not follow the format
    │   └── UnknownVersion        … because a newer release wrote it
    └── CorruptShard          bytes that differ from what was committed

A message is one line: where, what was expected, what was found, what to do next. Errors about settings and raw data
are here too, although artifacts have neither, so that all packages share one tree and one list of exit codes.
"""

from __future__ import annotations

import re
from typing import Any

SHOWN_LETTERS = 80  # of a value in a message


class DatamergeError(Exception):
    """Base of all errors raised on purpose; the command line prints its message without a traceback.

    Messages name settings as Python does, in backquotes: `` `keep_clean=True` ``. The command line shows flags.

    Attributes:
        field: name of the wrong setting; None if the error is not about a single one.
        exit_code: exit status of a process that ends with this error.
    """

    exit_code = 1

    def __init__(self, message: str, *, about: str | None = None) -> None:
        super().__init__(message)
        self.field = about

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)


class UserError(DatamergeError):
    """The request is invalid; nothing was changed."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, malformed, or incompatible with another one.

    A message about one setting begins with its name, `epsilon: expected …`, from which `field` is set.
    """

    def __init__(self, message: str, *, about: str | None = None) -> None:
        found = re.match(r"([a-z][a-z0-9_]*): ", message)
        super().__init__(message, about=about or (found[1] if found else None))


class SourceError(UserError):
    """Raw data is missing, empty or in an unsupported format."""


class NotAnArtifact(UserError):
    """The location holds no artifact, an unfinished one, or one made from other settings."""


class SchemaError(DatamergeError):
    """A JSON document of the artifact does not follow the format; the message lists every problem."""


class UnknownVersion(SchemaError):
    """The document has a schema version that this release does not read; the message names the one that does."""


class CorruptShard(DatamergeError):
    """Stored bytes differ from the committed ones."""


def _restored(kind: type[DatamergeError], args: tuple[Any, ...], state: dict[str, Any]) -> DatamergeError:
    """Rebuild a pickled error, as Ray sends it, without calling `__init__`, whose arguments subclasses may change."""
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def shortened(value: object) -> str:
    """`repr(value)` for an error message, cut to 80 characters; its type if it has no usable repr."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or deeply nested lists
        return f"one too long to show ({type(value).__name__})"
    return text if len(text) <= SHOWN_LETTERS else f"{text[: SHOWN_LETTERS - 1]}…"


def printable(foreign: str) -> str:
    """A foreign text on one line, with control characters escaped."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], foreign)
