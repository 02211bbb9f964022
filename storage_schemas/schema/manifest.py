"""The JSON documents of an artifact: `manifest.json` and one commit sidecar per shard.

Parsing is strict: an unknown key, a wrong type or an unknown version is an error, and all problems of a document are
reported at once with their paths. Every document is sealed: it holds the sha256 of its own bytes, so that a flipped
bit in a count or in the provenance is detected too. FORMAT.md describes every field.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Final, Literal, TypeVar

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from storage_schemas.display import one_line
from storage_schemas.errors import CorruptShard, SchemaError, UnknownVersion
from storage_schemas.schema.columns import Columns
from storage_schemas.schema.problems import in_words

SCHEMA_VERSION: Final = 1
MANIFEST = "manifest.json"
HEAD = "head.safetensors"
CARD, CROISSANT, PREVIEW = "README.md", "croissant.json", "preview.png"
KEYS = "keys.bin"  # see storage_schemas.key_index
COMBINED: Final = "combined"  # entry of the provenance that lists the artifacts which were combined
SHOWN_PROBLEMS: Final = 20  # in one message
PROBLEM_LETTERS: Final = 200  # shown of each problem
MOST_PER_SHARD: Final = 2**24
MAX_AXES: Final = 8  # of an array; NumPy allows 64, and Zarr adds one
UNSEALED = "0" * 64  # placeholder of the seal while the seal is computed

Format = Literal["zarr", "webdataset"]
EncodingName = Literal["float32", "uint8_moments"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}"
RelativePath = Annotated[str, Field(pattern=rf"^{_NAME}(/{_NAME})*$")]
# Largest integer that every JSON parser represents exactly.
LARGEST: Final = 2**53 - 1
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]+$")]

# The required arrays of each encoding; all others are optional.
MOMENT_ARRAYS: Final[Mapping[str, tuple[str, str]]] = {
    "float32": ("mean", "mean_square"),
    "uint8_moments": ("sum", "scatter"),
}
MOMENTS: Final = frozenset(name for names in MOMENT_ARRAYS.values() for name in names)


class Document(BaseModel):
    """A strict, immutable JSON document."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, ser_json_inf_nan="constants")


class Sealed(Document):
    """A document in a file of its own, which begins with the sha256 of its bytes."""

    self_sha256: Annotated[
        Sha256, Field(description="sha256 of this file with these 64 digits replaced by zeros; the first field")
    ]


class ArraySpec(Document):
    """One array of every record: its name, little-endian dtype and shape per record.

    Names that a release does not know are allowed: they are stored, checked and served like the others, so that an
    optional array can be added without a new schema version.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    dtype: Literal[
        "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64"
    ]
    shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(max_length=MAX_AXES)]

    @classmethod
    def of(cls, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> ArraySpec:
        """Make a spec from a NumPy dtype; raises ValidationError for names and dtypes outside the format."""
        return cls.model_validate({"name": name, "dtype": dtype.name, "shape": shape})

    @cached_property
    def little_endian(self) -> np.dtype[Any]:
        """The dtype in stored byte order."""
        return np.dtype(self.dtype).newbyteorder("<")

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one record's array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Layout(Document):
    """Physical format, encoding, arrays and shard grid of an artifact."""

    format: Format
    encoding: EncodingName
    arrays: tuple[ArraySpec, ...]
    groups: Annotated[int, Field(ge=1, le=LARGEST, description="planned groups, rejected ones included")]
    groups_per_shard: Annotated[int, Field(ge=1, le=MOST_PER_SHARD)]

    @model_validator(mode="after")
    def _arrays_go_together(self) -> Layout:
        names = [array.name for array in self.arrays]
        missing = [name for name in MOMENT_ARRAYS[self.encoding] if name not in names]
        if missing:
            raise ValueError(f"arrays: encoding {self.encoding} needs {' and '.join(missing)}, found {names}")
        if len(set(names)) < len(names) or {"count", "label"} & set(names):
            raise ValueError(f"arrays: expected distinct names other than count and label, found {names}")
        return self

    @model_validator(mode="after")
    def _shapes_go_together(self) -> Layout:
        pixels = self.pixels
        if len(pixels) != 3:
            raise ValueError(f"arrays: expected moments of shape [C, H, W], found {list(pixels)}")
        for array in self.arrays:
            if array.name in (*MOMENT_ARRAYS[self.encoding], "clean") and array.shape != pixels:
                raise ValueError(f"arrays: expected {array.name} {list(pixels)}, found {list(array.shape)}")
            if array.name in ("members", "factors") and array.shape[1:] != pixels:
                raise ValueError(f"arrays: expected {array.name} [n, *{list(pixels)}], found {list(array.shape)}")
            if array.name == "target" and len(array.shape) != 1:
                raise ValueError(f"arrays: expected target [K], found {list(array.shape)}")
        return self

    @property
    def pixels(self) -> tuple[int, ...]:
        """Shape [C, H, W] of an image."""
        return next(array.shape for array in self.arrays if array.name in MOMENT_ARRAYS[self.encoding])

    @property
    def shards(self) -> int:
        """Number of planned shards."""
        return -(-self.groups // self.groups_per_shard)

    @property
    def bytes_per_record(self) -> int:
        """Uncompressed bytes of one record's arrays."""
        return sum(array.nbytes for array in self.arrays)

    def array(self, name: str) -> ArraySpec | None:
        return next((array for array in self.arrays if array.name == name), None)


class FileEntry(Document):
    """A file of the artifact, its size and hash."""

    path: RelativePath
    bytes: Count
    sha256: Sha256


class RecordEntry(Document):
    """The entry of one record in a commit.

    `checksums` are the crc32c of each array's little-endian bytes, the same in every format.
    `offsets` (webdataset only) are the positions of the raw array data inside the tar file.
    """

    key: Key
    count: Annotated[int, Field(ge=1, le=LARGEST)]
    label: Annotated[int, Field(ge=-LARGEST, le=LARGEST)] | None
    samples: tuple[str, ...]
    checksums: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]]
    offsets: dict[str, Count] | None
    info: dict[str, float]


class Reject(Document):
    """A sample that could not be used, and why."""

    key: str
    sample: str
    reason: str


class Ranges(Document):
    """Extremes of a shard's moments in [0, 1] pixel units, and how often the variance had to be clipped."""

    mean_min: float
    mean_max: float
    variance_max: float
    variance_mean: float
    clipped_variances: Count


class Commit(Sealed):
    """The sidecar that makes a shard exist; written last."""

    schema_version: Literal[1]
    shard: Annotated[int, Field(ge=0)]
    plan_sha256: Sha256
    files: tuple[FileEntry, ...]
    records: tuple[RecordEntry, ...]
    rejects: tuple[Reject, ...]
    ranges: Ranges | None

    @property
    def bytes(self) -> int:
        """Bytes of the shard's files."""
        return sum(file.bytes for file in self.files)


class ShardEntry(Document):
    """The entry of one committed shard in the manifest.

    `key_range` is the first and the last of its keys in alphabetical order: a key is looked up in the shards whose
    range contains it.
    """

    shard: Annotated[int, Field(ge=0)]
    groups: Count
    rejected: Count
    bytes: Count
    commit_sha256: Sha256
    key_range: tuple[Key, Key] | None

    @classmethod
    def of(cls, commit: Commit, commit_sha256: str) -> ShardEntry:
        """The entry for a sidecar whose file has this sha256."""
        keys = sorted(record.key for record in commit.records)
        return cls(
            shard=commit.shard,
            groups=len(commit.records),
            rejected=len(commit.rejects),
            bytes=commit.bytes,
            commit_sha256=commit_sha256,
            key_range=(keys[0], keys[-1]) if keys else None,
        )


class Origin(Document):
    """One of the artifacts that were combined."""

    plan_sha256: Sha256
    groups: Count
    provenance: dict[str, JsonValue]


class Origins(Document):
    """The part of a provenance that lists the artifacts which were combined into this one."""

    model_config = ConfigDict(extra="ignore")

    combined: Annotated[list[Origin], Field(min_length=1)] | None = None


class Manifest(Sealed):
    """`manifest.json`: the layout, the provenance of the groups, and the committed shards."""

    schema_version: Literal[1]
    writer: str
    complete: bool
    layout: Layout
    plan_sha256: Sha256
    provenance: dict[str, JsonValue]
    files: tuple[FileEntry, ...]
    shards: Columns[ShardEntry]

    @model_validator(mode="after")
    def _shards_are_of_the_layout(self) -> Manifest:
        numbers = self.shards.column("shard")
        planned = range(self.layout.shards)
        if any(b <= a for a, b in pairwise(numbers)) or not all(number in planned for number in numbers):
            raise ValueError(f"shards: expected ascending numbers below {self.layout.shards}")
        if any(groups > self.layout.groups_per_shard for groups in self.shards.column("groups")):
            raise ValueError(f"shards: expected at most {self.layout.groups_per_shard} groups in each")
        if self.complete and len(numbers) < len(planned):
            raise ValueError(f"shards: expected all {len(planned)} where complete is true, found {len(numbers)}")
        return self

    @field_validator("provenance")
    @classmethod
    def _origins_are_described(cls, provenance: dict[str, JsonValue]) -> dict[str, JsonValue]:
        Origins.model_validate(provenance)
        return provenance

    @property
    def outline(self) -> tuple[str, ...]:
        """Phrases for a one-line summary: how much is committed, and in what form."""
        layout = self.layout
        size = f"{self.groups} groups", f"{len(self.shards)} of {layout.shards} shards"
        return *size, f"pixels {list(layout.pixels)}", f"{layout.encoding} in {layout.format}"

    def __repr__(self) -> str:
        return one_line(self, "", *self.outline)

    __str__ = __repr__

    @property
    def groups(self) -> int:
        """Groups that are committed."""
        return sum(self.shards.column("groups"))

    @property
    def bytes(self) -> int:
        """Bytes of all committed shards."""
        return sum(self.shards.column("bytes"))


def commit_path(shard: int) -> str:
    """Path of a shard's sidecar in the artifact."""
    return f"commits/{shard:05d}.json"


def shard_of_sidecar(path: str) -> int | None:
    """The shard whose sidecar has this path; None for any other path."""
    digits = path.removeprefix("commits/").removesuffix(".json")
    return int(digits) if digits.isdecimal() and commit_path(int(digits)) == path else None


D = TypeVar("D", bound=Sealed)


def parse(model: type[D], data: bytes, where: str) -> D:
    """Parse a sealed JSON document.

    Args:
        model: class of the document.
        data: contents of the file.
        where: path or URL of the file, for messages.

    Raises:
        UnknownVersion: a newer release wrote the document; the message names it.
        SchemaError: the document does not follow the format; the message lists every problem with its path.
        CorruptShard: the document follows the format but does not match its seal.
    """
    try:
        document = model.model_validate_json(data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    else:
        _check_seal(data, document.self_sha256, where)
        return document
    for problem in problems:
        if problem["loc"] == ("schema_version",) and isinstance(problem["input"], int):
            found = json.loads(data)
            # All versions are sealed alike, so a flipped bit in the version is detected as damage.
            _check_seal(data, str(found.get("self_sha256", _seal(data))), where)
            raise UnknownVersion(_unknown_version(problem["input"], found.get("writer"), where))
    details = "; ".join(
        f"{_dotted(p['loc'])[:PROBLEM_LETTERS]}: {in_words(p)[:PROBLEM_LETTERS]}" for p in problems[:SHOWN_PROBLEMS]
    )
    more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    raise SchemaError(f"{where}: {len(problems)} problem(s): {details}{more}")


def dump(document: Sealed) -> bytes:
    """Serialise and seal a document; the same document always gives the same bytes."""
    unsealed = document.model_copy(update={"self_sha256": UNSEALED})
    data = unsealed.model_dump_json(indent=1).encode() + b"\n"
    return data.replace(UNSEALED.encode(), _seal(data).encode(), 1)


def _seal(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _check_seal(data: bytes, seal: str, where: str) -> None:
    if _seal(data.replace(seal.encode(), UNSEALED.encode(), 1)) != seal:
        raise CorruptShard(f"{where}: the document does not have its own sha256; it is damaged or was edited")


def _unknown_version(found: int, writer: Any, where: str) -> str:
    release = f"{writer}, which wrote it, or a newer one" if isinstance(writer, str) else "a newer datamerge"
    return (
        f"{where}: schema_version {found} is not supported by this release (it reads {SCHEMA_VERSION}); "
        f"install {release}"
    )


def _dotted(location: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in location) or "document"
