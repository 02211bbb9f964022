"""Images in columns of Parquet and Arrow tables, of any type.

binary, large or fixed-size, views, dictionaries      encoded images
{bytes, path}                                         `Image` of Hugging Face: encoded, or a file beside the table
lists of uint8, also of fixed size                    encoded if flat, pixels [H, W], [H, W, C] or [C, H, W] if nested
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from datamerge.sources.images import BadImage
from datamerge.sources.labels import label_columns
from datamerge.sources.sample import RawImage
from storage_schemas import Location, SourceError

SHOWN_COLUMNS = 12


def image_column(schema: pa.Schema, named: str | None, where: str) -> str:
    """The column of images: the named one, or the only candidate.

    Raises:
        SourceError: there is no such column, none holds images, or there are several and none is named.
    """
    usual = [field.name for field in schema if is_encoded(field.type)]
    candidates = usual or [field.name for field in schema if _is_unusual(field.type)]
    if len(candidates) > 1:  # labels may be bytes too
        candidates = [name for name in candidates if not any(label_columns([name]))] or candidates
    if named is None and len(candidates) == 1:
        return str(candidates[0])
    if named is None and candidates:
        raise SourceError(f"{where}: expected one image column, found {candidates}; name it with `image_column`")
    found = ", ".join(f"{field.name} {_shortened(field.type)}" for field in list(schema)[:SHOWN_COLUMNS])
    if named is None:
        raise SourceError(
            f"{where}: expected a column of images (encoded bytes, or a struct of bytes and path), found {found}; "
            "name files that have one, or store an image's bytes in each row"
        )
    images = f"; images are in {candidates}" if candidates else ""
    if named not in schema.names:
        raise SourceError(f"{where}: expected the image column {named!r}, found {found}{images}")
    kind = schema.field(named).type
    if not is_encoded(kind) and not _is_unusual(kind):
        several = "; one image a row is needed" if _is_list(kind) else ""
        raise SourceError(
            f"{where}: expected encoded images in the image column {named!r}, found "
            f"{_shortened(kind)}{several}{images}"
        )
    return named


def has_images(schema: pa.Schema) -> bool:
    """Whether any column may hold images."""
    return any(is_encoded(field.type) or _is_unusual(field.type) for field in schema)


def is_encoded(kind: pa.DataType) -> bool:
    """Whether values of a type may be encoded images in the form of nearly all tables."""
    kind = _plain(kind)
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_unusual(kind: pa.DataType) -> bool:
    """Whether values may be images if no other column has any; digests and embeddings have such types too."""
    kind = _plain(kind)
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("path") >= 0)
    return bool(pa.types.is_fixed_size_binary(kind)) or (_is_list(kind) and bool(pa.types.is_uint8(_innermost(kind))))


def _plain(kind: pa.DataType) -> pa.DataType:
    """The value type, without extension types and dictionary encoding."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def _is_list(kind: pa.DataType) -> bool:
    checks = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    return any(check(kind) for check in (*checks, *views))


def _innermost(kind: pa.DataType) -> pa.DataType:
    kind = _plain(kind)
    return _innermost(kind.value_type) if _is_list(kind) else kind


def _shortened(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 40 else f"{text[:39]}…"


def to_image(value: Any, location: Location, table: str, row: int) -> RawImage:
    """The image in a cell.

    Args:
        value: value of the cell.
        location: location of the table.
        table: path of the table.
        row: row of the cell, for messages.

    Raises:
        BadImage: the cell holds no image, or the path of a missing file.
    """
    where = f"row {row} of {table}"
    if isinstance(value, dict):
        path = value.get("path")
        value = value.get("bytes")
        if value is None and path is not None:
            return read_beside(location, table, path, where)
    if value is None:
        raise BadImage(f"{where}: no image (null)")
    if isinstance(value, bytes):
        return value
    if isinstance(value, list):
        return _from_list(value, where)
    raise BadImage(f"{where}: the image column holds no bytes")


def _from_list(values: list[Any], where: str) -> RawImage:
    try:
        array = np.asarray(values, np.uint8)
    except (ValueError, TypeError, OverflowError):
        raise BadImage(f"{where}: lists of other lengths, or with nulls") from None
    if array.ndim == 1:
        return array.tobytes()
    if array.ndim == 3 and array.shape[2] not in (1, 3) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3):
        return Image.fromarray(np.ascontiguousarray(array))
    raise BadImage(f"{where}: expected pixels [H, W], [H, W, C] or [C, H, W], found {list(array.shape)}")


def read_beside(location: Location, table: str, path: str, where: str) -> bytes:
    """Read a file that a table names by its path relative to the table's folder.

    Raises:
        BadImage: there is no such file, or the path leaves the folder.
    """
    name = path_beside(table, path)
    if name is None:
        raise BadImage(f"{where}: names {path!r}, which is not a path below its folder")
    try:
        return location.read(name)
    except FileNotFoundError:
        raise BadImage(f"{where}: names {path!r}, which is not beside it") from None


def path_beside(table: str, path: str) -> str | None:
    """The path in the source of a file that a table names; None if it leaves the table's folder."""
    parts = [part for part in path.replace("\\", "/").split("/") if part != "."]
    if "" in parts or ".." in parts or "://" in path:
        return None
    folder = table.rpartition("/")[0]
    return "/".join(filter(None, [folder, *parts]))


def check_paths(location: Location, table: str, paths: Sequence[str | None], where: str) -> list[tuple[str, int]]:
    """The existing files that a table of paths names, each once, with their sizes in bytes.

    Raises:
        SourceError: the first file is missing.
    """
    names = [None if path is None else path_beside(table, path) for path in paths]
    files: dict[str, int] = {}
    for path, name in zip(paths, names, strict=True):
        if path is None or name in files:
            continue
        try:
            files[name or ""] = location.size(name) if name else _not_there(path)
        except FileNotFoundError:
            if not files:
                raise SourceError(
                    f"{where}: holds no images but their paths, and {path!r} is not below its folder; put the images "
                    "there, or store their bytes in the table"
                ) from None
    return sorted(files.items())


def _not_there(path: str) -> int:
    raise FileNotFoundError(path)
