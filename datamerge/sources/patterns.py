"""Finds files by globs and braces on any file system; existing files whose names look like patterns win."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import braceexpand

from datamerge.sources.sample import check_listed
from datamerge.sources.suffixes import ARROW, PARQUET, TAR
from storage_schemas import Location, SourceError, redact
from storage_schemas.access.local_paths import user_path
from storage_schemas.access.redaction import split_query

if TYPE_CHECKING:
    from datamerge.sources.files import File  # pyarrow takes half a second

_SUFFIXES = (*TAR, *PARQUET, *ARROW)
_SPECIAL = re.compile(r"[*?\[{]")


def is_pattern(url: str) -> bool:
    """Whether a source is a pattern of files, or one tar, which the query of a URL may name."""
    base, query = split_query(url)
    lower = base.lower()
    if not _SPECIAL.search(base):
        is_tar = lower.endswith(TAR) or query.lower().endswith(TAR)  # …/get?file=x.tar
        return is_tar and not ("://" not in base and user_path(base).is_dir())
    if not any(suffix in lower for suffix in (*_SUFFIXES, "*")):
        return False
    return not _is_literal(base, query)


def find_files(url: str) -> tuple[Location, list[File]]:
    """The common folder of the files that a pattern matches, and the files.

    Raises:
        SourceError: nothing matches, or the files are on several hosts.
    """
    base, query = split_query(url)
    paths: list[str] = []
    for pattern in _expanded(base, query):
        found = _matches(pattern, query)
        if not found:
            raise SourceError(f"{redact(pattern)}: expected files, found nothing there")
        paths += found
    folder = paths[0].rpartition("/")[0]
    while not all(path.startswith(f"{folder}/") for path in paths):
        folder = folder.rpartition("/")[0]
    if folder.endswith(":/"):  # the common prefix of s3://a and s3://b
        raise SourceError(f"{redact(base)}: expected files of one host or bucket, found several; name one of them")
    location = Location(f"{folder or '/'}{query}")
    files = []
    for path in paths:
        name = path[len(folder) + 1 :]
        check_listed(location, name)
        try:
            files.append((name, location.size(name)))
        except FileNotFoundError:
            raise SourceError(f"{redact(path)}: expected a file, found nothing there") from None
    return location, files


def _expanded(base: str, query: str) -> list[str]:
    """Expand the braces of a pattern, except in existing folders; local patterns become absolute."""
    base = base if "://" in base else str(user_path(base).absolute())
    folder, _, name = base.rpartition("/")
    if _is_literal(folder, query):
        return [f"{folder}/{last}" for last in braceexpand.braceexpand(name)]
    return list(braceexpand.braceexpand(base))


def _is_literal(place: str, query: str) -> bool:
    """Whether a file or folder exists whose name looks like a pattern; hosts and buckets have no such names."""
    host = place.partition("://")[2].partition("/")[0]
    if not _SPECIAL.search(place) or place.startswith("http") or _SPECIAL.search(host):
        return False
    return Location(f"{place}{query}").exists()


def _matches(pattern: str, query: str) -> list[str]:
    """Files that a pattern without braces matches; a plain path is not checked for existence."""
    folder, _, name = pattern.rpartition("/")
    if not re.search(r"[*?\[]", name if _is_literal(folder, query) else pattern):
        return [pattern]
    if not _is_literal(folder, query):
        folder = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
    location = Location(f"{folder or '/'}{query}")
    return [f"{folder}/{name}" for name in location.glob(pattern[len(folder) + 1 :])]
