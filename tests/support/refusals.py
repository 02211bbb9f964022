"""Refusals by what a program can rely on: class, field, exit code and the facts in the message, not its sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from storage_schemas import DatamergeError


@contextmanager
def refused(
    kind: type[DatamergeError], field: str | None = None, *facts: object
) -> Iterator[pytest.ExceptionInfo[DatamergeError]]:
    """The block raises `kind` about the setting `field` (None: about no single one), in one line that has the facts.

    Args:
        kind: the class itself, not one above it.
        field: of the error.
        facts: numbers, names, keys and paths that the message shows.
    """
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value)
    assert (type(caught.value), caught.value.field) == (kind, field), message
    assert "\n" not in message
    missing = [fact for fact in map(str, facts) if fact not in message]
    assert not missing, f"{missing} not in {message!r}"
