"""Arrays of 8-bit images: MNIST's IDX files (also .gz) and NumPy .npz archives.

    IDX    NAME-images-idx3-ubyte[.gz], labels beside it in NAME-labels-idx1-ubyte[.gz]
    .npz   one uint8 array [M, H, W], [M, H, W, C] or [M, C, H, W] of images, one array [M] of labels, others [M];
           class names by index in `class_names` or `classes`

Every worker reads the file once.
"""

from __future__ import annotations

import hashlib
import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from lzma import LZMAError
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from datamerge.runtime.messages import say, warn
from datamerge.sources.array_shapes import (
    IMAGE_ARRAYS,
    LABEL_ARRAYS,
    NAME_ARRAYS,
    arrays_of_splits,
    choose_arrays,
    find_images,
)
from datamerge.sources.columns import Samples, Values, label_column
from datamerge.sources.labels import NONE, NoClass, choose_column, read_labels, shown
from datamerge.sources.naming import Rows
from datamerge.sources.sample import Columns, Sample, Source, fingerprint, make_keys
from datamerge.sources.splits import split_of_name
from datamerge.sources.unpack import gunzip, refuse_bomb
from storage_schemas import ConfigError, Location, SourceError

_IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
# zipfile raises RuntimeError if a password is needed; parsing an array's header, a Python literal, can raise many.
_BROKEN_NPZ = (
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    LZMAError,
    OSError,
    EOFError,
    RuntimeError,
    MemoryError,
    TypeError,
    SyntaxError,
    ArithmeticError,
    LookupError,
    tokenize.TokenError,
)

Array = npt.NDArray[Any]


class ArrayReader:
    """Reads images of an array, which is loaded on first use."""

    is_concurrent = False
    is_remote = False

    def __init__(self, location: Location, file: str, column: str | None) -> None:
        self._location, self._file, self._column = location, file, column
        self._images: Array | None = None

    def read(self, sample: Sample) -> Image.Image:
        if self._images is None:
            where = f"{self._location.url}/{self._file}"
            self._images = find_images(_parse(self._location.read(self._file), where), self._column, where)[1]
        index = int(sample.name.rpartition("#")[2])
        if index >= len(self._images):
            raise OSError(f"{self._file} has no image {index}")
        return Image.fromarray(self._images[index])

    def __getstate__(self) -> dict[str, Any]:
        return {"_location": self._location, "_file": self._file, "_column": self._column, "_images": None}


def holds_images(location: Location, name: str) -> bool:
    """Whether the headers of a file show an array that may hold images; True if they are broken."""
    if not name.lower().endswith((".npz", ".npy")):
        return "label" not in name and "idx1" not in name
    try:
        with location.open(name) as stream:
            if name.lower().endswith(".npy"):
                return _rank(stream) in (3, 4)
            with zipfile.ZipFile(stream) as members:
                ranks = []
                for member in members.namelist():
                    if member.endswith(".npy"):
                        with members.open(member) as array:
                            ranks.append(_rank(array))
                return any(rank in (3, 4) for rank in ranks)
    except _BROKEN_NPZ:
        return True


def _rank(stream: IO[bytes]) -> int:
    """Number of axes of an array, from its header."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return len(read(stream)[0])


def open_arrays(location: Location, file: str, columns: Columns, split: str | None = None) -> Source:
    """List the images of an array file; of several splits, the one for training is the default.

    Raises:
        ConfigError: there is no such split.
        SourceError: the file is no array file, or its arrays do not fit together.
    """
    where = f"{location.url}/{file}"
    location.pin(file)  # readers load the file again, and must get the same version
    data = location.read(file)
    arrays = _parse(data, where)
    split, splits, columns = _of_split(arrays, columns, split, where)
    column, images = find_images(arrays, columns.image, where)
    if arrays[column].ndim == len(images) == 3:
        say(f"{where}: {column} {list(images.shape)} is read as 3 grey images, not as one image with three channels")
    if images.max() == 1:
        say(f"{where}: {column} holds 0 and 1 only, which is black; if 1 is white, save (255 * x).astype(np.uint8)")
    listing = {file: _facts(data)}
    beside = _labels_beside(location, file)
    if beside is not None:
        data = location.read(beside)
        arrays["labels"] = _parse_idx(data, f"{location.url}/{beside}")
        listing[beside] = _facts(data)
    label_name, unlabelled = _label_array(arrays, (column, columns.group), columns.label, len(images), where)
    names_array, class_names = _class_names(arrays, (column, label_name, columns.group), where)
    try:
        labels, names = read_labels(
            _values(arrays, label_name, len(images), where), f"{where}, {label_name!r}", class_names
        )
    except NoClass as error:
        raise SourceError(
            f"{where}: expected whole numbers or text in {label_name!r}, found {error}; name another array, or use "
            f"`label_column={NONE!r}`"
        ) from None
    if class_names and names == class_names:
        say(f"{where}: the names of {len(names)} classes are taken from {names_array!r}: {shown(names)}")
    elif class_names and names:  # `read_labels` warns if labels are numbers beyond the names
        warn(f"{where}: labels are not all among the {len(class_names)} names in {names_array!r}, which are left out")
    groups = _values(arrays, columns.group, len(images), where)
    (stem,) = make_keys([file.partition(".")[0]])
    of_split, stem = (file, stem) if split is None else (f"{file} {column}", f"{stem}-{split}")
    values = None if columns.group is None else Values.of(None if group is None else str(group) for group in groups)
    samples = Samples(Rows.of([of_split], [stem], [len(images)]), label_column(labels), values)
    identity = fingerprint([column, label_name, columns.group, listing])
    reader = ArrayReader(location, file, column)
    source = Source(where, "arrays", samples, names, identity, reader, listing, unlabelled=unlabelled)
    return replace(source, split=split, splits=splits)


def _of_split(
    arrays: Mapping[str, Array], columns: Columns, split: str | None, where: str
) -> tuple[str | None, dict[str, int], Columns]:
    """The split to use, the number of images of each split, and the columns with the split's arrays."""
    if columns.image is not None and split is None:  # the name of the array determines the split
        parts = arrays_of_splits(arrays).get(split_of_name(columns.image) or "", {})
        return None, {}, replace(columns, label=columns.label or _first(parts, LABEL_ARRAYS))
    split, parts, splits = choose_arrays(arrays, split, where)
    if columns.image is not None and columns.image not in parts.values():
        raise ConfigError(
            f"split: expected the split of array {columns.image!r} of {where}, found {split!r}; drop `split`"
        )
    image = columns.image or _first(parts, IMAGE_ARRAYS)
    return split, splits, replace(columns, image=image, label=columns.label or _first(parts, LABEL_ARRAYS))


def _first(parts: Mapping[str, str], names: Sequence[str]) -> str | None:
    return next((parts[name] for name in names if name in parts), None)


def _facts(data: bytes) -> list[Any]:
    return [len(data), hashlib.sha256(data).hexdigest()]


def _parse(data: bytes, where: str) -> dict[str, Array]:
    """The arrays of a file by name; the array of an IDX file is called `images`."""
    if data.startswith(b"\x93NUMPY") and not where.lower().endswith(".npz"):
        return {"images": _parse_npy(data, where)}
    if not where.lower().endswith((".npz", ".npy")) and not data.startswith(b"PK"):
        return {"images": _parse_idx(data, where)}
    stored = io.BytesIO(data)
    try:
        with zipfile.ZipFile(stored) as members:
            # The sum of all members counts, as all are loaded.
            refuse_bomb(sum(member.file_size for member in members.infolist()), stored.getbuffer().nbytes)
        with np.load(stored, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except _BROKEN_NPZ as error:
        raise SourceError(f"{where}: expected an .npz archive of plain arrays: {error}") from None
    # For other members NumPy returns bytes.
    return {name: array for name, array in found.items() if isinstance(array, np.ndarray)}


def _parse_npy(data: bytes, where: str) -> Array:
    try:
        array: Array = np.load(io.BytesIO(data), allow_pickle=False)
    except _BROKEN_NPZ as error:
        raise SourceError(f"{where}: expected an .npy file of a plain array: {error}") from None
    return array


def _parse_idx(data: bytes, where: str) -> Array:
    """An IDX file: two zero bytes, dtype, number of dimensions, sizes as big-endian 32-bit integers, data."""
    try:
        data = gunzip(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, ValueError) as error:
        raise SourceError(f"{where}: broken gzip: {error}") from None
    dtype = _IDX_DTYPES.get(data[2]) if len(data) > 4 and data[:2] == b"\0\0" else None
    shape = np.frombuffer(data, ">u4", data[3], 4).tolist() if dtype and len(data) >= 4 + 4 * data[3] else []
    start = 4 + 4 * len(shape)
    if dtype is None or len(data) - start != math.prod(shape) * np.dtype(dtype).itemsize:
        raise SourceError(f"{where}: expected an IDX file, found {len(data)} bytes in another format")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def _labels_beside(location: Location, file: str) -> str | None:
    """The file of labels beside an IDX file of images, if it exists."""
    name = file.replace("images", "labels").replace("idx3", "idx1")
    plain = name.removesuffix(".gz")
    candidates = [name, plain, f"{plain}.gz"] if name != file else []
    return next((candidate for candidate in candidates if location.exists(candidate)), None)


def _label_array(
    arrays: dict[str, Array], taken: tuple[str | None, ...], named: str | None, count: int, where: str
) -> tuple[str | None, str]:
    """Name of the array of labels, or the reason why there is none."""
    if named is not None:
        return (None if named == NONE and named not in arrays else named), ""
    others = [name for name in arrays if name not in taken]
    usual = next((name for name in LABEL_ARRAYS if name in others), None)
    if usual is not None:
        if usual == LABEL_ARRAYS[-1]:  # `arr_1`, the default name, does not say that it holds labels
            say(f"{where}: labels are taken from {usual!r}; `label_column` names another array")
        return usual, ""
    return choose_column([name for name in others if arrays[name].shape[:1] == (count,)], where)


def _class_names(arrays: Mapping[str, Array], taken: tuple[str | None, ...], where: str) -> tuple[str, list[str]]:
    """Name and content of an array of class names by index; empty if there are no labels."""
    given = next((name for name in NAME_ARRAYS if name in arrays and name not in taken), None)
    if given is None or taken[1] is None or arrays[given].dtype.kind not in "US":
        return "", []
    texts = arrays[given].ravel().tolist()
    names = [text.decode(errors="replace") if isinstance(text, bytes) else text for text in texts]
    if arrays[given].ndim != 1 or len(set(names)) < len(names):
        warn(
            f"{where}: {given} {list(arrays[given].shape)} with {len(set(names))} different texts is no list of "
            "distinct class names; it is left out"
        )
        return "", []
    return given, names


def _values(arrays: dict[str, Array], column: str | None, count: int, where: str) -> list[Any]:
    """One value per image, a list for one-hot rows; None for each if no array is named."""
    if column is None:
        return [None] * count
    values = arrays.get(column)
    if values is None or values.shape[:1] != (count,) or values.ndim > 2:
        found = sorted(arrays) if values is None else f"{column} {list(values.shape)}"
        raise SourceError(f"{where}: expected an array {column!r} with {count} values, found {found}")
    if values.dtype.kind not in "iuUbfS":
        raise SourceError(f"{where}: expected whole numbers or text in {column!r}, found {values.dtype}")
    return list((values.reshape(count) if values.size == count else values).tolist())
