"""Checks of errors by class, field and the facts in the message, not by its wording."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from storage_schemas import DatamergeError

_FOLDER = re.compile(r"/\S*?/pytest-of-[^/]+/pytest-\d+/(popen-gw\d+/)?[^/\s:,;]*")


@contextmanager
def refused(
    kind: type[DatamergeError], field: str | None = None, *facts: object
) -> Iterator[pytest.ExceptionInfo[DatamergeError]]:
    """Check that the block raises `kind` with this field, and a one-line message that contains the facts.

    Args:
        kind: the exact class of the error, not a base class.
        field: the error's field, or None for an error about no single setting.
        facts: numbers, names, keys and paths that the message shows.
    """
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value)
    assert (type(caught.value), caught.value.field) == (kind, field), message
    assert "\n" not in message
    # pytest names a test's folder after the test: a fact in that name would always be found.
    elsewhere = _FOLDER.sub("", message)
    missing = [fact for fact in map(str, facts) if fact not in (message if _FOLDER.search(fact) else elsewhere)]
    assert not missing, f"{missing} not in {message!r}"
