"""Raw images as 8-bit pixels: folders, Parquet, WebDataset tars, arrays, your own data sets; see README.md."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from datamerge.runtime.factories import PREFIX
from datamerge.sources.factories import open_factory
from datamerge.sources.image_folder import EXTENSIONS, open_image_folder
from datamerge.sources.images import BadImage, decode, native_shape
from datamerge.sources.sample import LISTING, Columns, RawImage, Reader, Sample, Source, check_listed
from datamerge.sources.tars import is_tar_url, open_tar_url, open_tars
from storage_schemas import Location, SourceError, redact
from storage_schemas.schema.arguments import check_count

__all__ = [
    "LISTING",
    "BadImage",
    "RawImage",
    "Reader",
    "Sample",
    "Source",
    "decode",
    "native_shape",
    "open_source",
]


def open_source(
    url: str | os.PathLike[str],
    *,
    limit: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
) -> Source:
    """List a source: images, Parquet files or tars in a folder, one such file, arrays, or your own data set.

    Args:
        url: path, fsspec URL, pattern of tars, or `python:MODULE:FACTORY`.
        limit: use the first `limit` samples only.
        image_column: column or array of images; needed when there are several.
        label_column: column, array or tar member of labels; the usual names by default.
        group_column: column, array or tar member whose values name groups.

    Raises:
        ConfigError: a limit below 1.
        SourceError: nothing there, or nothing of these kinds.
    """
    if limit is not None:
        check_count("limit", limit)
    text = os.fspath(url)
    columns = Columns(image_column, label_column, group_column)
    if text.startswith(PREFIX):
        if columns != Columns():
            raise SourceError(f"{text}: a data set of (image, label) has no columns; leave their names out")
        return open_factory(text, limit)
    if text.startswith("pipe:"):
        raise SourceError(f"{redact(text)}: expected files, found a command; give the path or URL of its tars")
    if is_tar_url(text):
        return open_tar_url(text, columns).limited(limit)
    location = Location(url)
    if not location.exists():
        raise SourceError(f"{location.url}: expected images, Parquet files, tars or arrays, found nothing there")
    source = (_open_file if location.is_file() else _open_folder)(location, columns)
    return replace(source, url=location.url).limited(limit)


def _open_file(location: Location, columns: Columns) -> Source:
    parent, name = location.split()
    check_listed(parent, name)
    if name.endswith(".parquet"):
        from datamerge.sources.parquet import open_parquet  # pyarrow takes half a second

        return open_parquet(parent, [(name, parent.size(name))], columns)
    from datamerge.sources.arrays import is_array_file, open_arrays

    if is_array_file(name):
        return open_arrays(parent, name, columns)
    expected = "a .parquet or .tar file, an .npz archive or an IDX file"
    if location.is_read_only:
        raise SourceError(
            f"{location.url}: expected {expected}; web servers list no folders, give the URL of one of these"
        )
    raise SourceError(f"{location.url}: expected a folder, {expected}")


def _open_folder(location: Location, columns: Columns) -> Source:
    below = location.files()
    if files := _chosen(location, below, (".parquet",)):
        from datamerge.sources.parquet import open_parquet

        return open_parquet(location, files, columns)
    if files := _chosen(location, below, (".tar",)):
        return open_tars(location, location.url, files, columns)
    if files := _chosen(location, below, EXTENSIONS):
        return open_image_folder(location, files, columns)
    raise SourceError(
        f"{location.url}: expected a folder with images ({' '.join(EXTENSIONS[:4])} …), Parquet files or tars, found "
        "none below it"
    )


def _chosen(
    location: Location, below: Mapping[str, Mapping[str, Any]], extensions: Sequence[str]
) -> list[tuple[str, int]]:
    """Sorted (path relative to the location, bytes) of files with one of the extensions, hidden ones left out.

    Raises:
        SourceError: a device, a pipe, or a name that is no text.
    """
    files = []
    for name, entry in below.items():
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        if not hidden and name.lower().endswith(tuple(extensions)):
            check_listed(location, name, entry["type"])
            files.append((name, int(entry["size"])))
    return sorted(files)
