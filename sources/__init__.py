"""Raw images: image folders and Parquet files, anywhere fsspec reaches, as 8-bit pixels."""

from __future__ import annotations

import os

from sources.image_folder import list_files, open_image_folder
from sources.images import BadImage, decode, native_shape
from sources.sample import Reader, Sample, Source
from storage_schemas import Location, SourceError

__all__ = ["BadImage", "Reader", "Sample", "Source", "decode", "native_shape", "open_source"]


def open_source(
    url: str | os.PathLike[str],
    *,
    limit: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """List a source: a `.parquet` file, a folder of them, or a folder of images.

    Args:
        url: path or fsspec URL.
        limit: use the first `limit` samples only.
        image_column: Parquet column of images; needed when there are several.
        label_column: Parquet column of labels; `label`, `labels` or `fine_label` by default.

    Raises:
        SourceError: nothing there, or nothing we read.
    """
    location = Location(url)
    if not location.exists():
        raise SourceError(f"{location.url}: expected a folder of images or Parquet files, found nothing there")
    if location.fs.isfile(location.root):
        location, name = location.split()
        if not name.endswith(".parquet"):
            raise SourceError(f"{location.url}/{name}: expected a folder or a .parquet file")
        files = [(name, location.size(name))]
    else:
        files = list_files(location, (".parquet",))
    if files:
        from sources.parquet import open_parquet  # pyarrow takes half a second

        return open_parquet(location, files, image_column, label_column).limited(limit)
    return open_image_folder(location).limited(limit)
